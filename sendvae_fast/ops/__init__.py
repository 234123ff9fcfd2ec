"""Fused operations: one module per op, with reference, autograd and backend dispatch."""
