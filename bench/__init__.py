"""Benchmarks. Each is a program: `python -m bench.<name> --help`. Recorded results are in bench/results."""
