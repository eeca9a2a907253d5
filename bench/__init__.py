"""Benchmarks: run with `python -m bench.NAME`; records land in bench/results."""
