"""Kernels that are complete and tested but that no worker calls yet."""
