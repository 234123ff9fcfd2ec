"""Benchmarks and checks that are run by hand, on the machine they speak of."""
