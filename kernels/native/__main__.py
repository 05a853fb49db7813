"""`python -m kernels.native`: compile for every kind of CPU, for images that hold no compiler."""

from kernels.native.library import cache_folder, compile_for_every_cpu

compile_for_every_cpu(cache_folder())
