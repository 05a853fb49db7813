"""Echelon's front door: the Python client and the `echelon` command."""

__version__ = "0.1.0"
