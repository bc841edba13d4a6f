"""Benchmarks: ours beside the floor, in one run, interleaved. `python -m bench` prints the tables."""
