"""One compute thread for tests: several processes share a few cores, and spinning threads cost more than they give."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
