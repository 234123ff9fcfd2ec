"""Runs the CUDA kernels of csrc on the CPU, under checks; README.md says what that proves."""
