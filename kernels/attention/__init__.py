"""Attention over a paged KV cache: its launcher, its kernels, its CPU paths and the plan that divides the work."""
