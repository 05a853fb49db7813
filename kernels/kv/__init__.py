"""Writes to the KV cache and copies of its blocks."""
