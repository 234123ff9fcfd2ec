"""When a test gives something up that does not end. No test asserts how fast anything is: that is for bench/."""

HANG_S = 1800
"""Longer than anything here takes on the slowest machine: what is not done then hangs."""
