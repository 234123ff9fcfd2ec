"""Benchmarks and checks, run by hand on the machine to measure."""
