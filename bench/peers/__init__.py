"""The parts of `python -m bench.peers`."""
