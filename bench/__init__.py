"""Benchmarks: run with `python -m bench.NAME`; records go into bench/results."""
