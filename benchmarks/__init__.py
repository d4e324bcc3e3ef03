"""Benchmarks, run from a checkout as `python -m benchmarks.<name>`; see README.md beside this file."""
