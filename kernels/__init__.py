"""Operators of the forward pass and the sampler. docs/kernels.md lists them by subpackage."""
