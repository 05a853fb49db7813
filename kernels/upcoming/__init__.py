"""Kernels that are complete and tested, but not called by workers yet."""
