"""Everything end to end on a small scale."""
