"""Rendered scenes with known attributes."""
