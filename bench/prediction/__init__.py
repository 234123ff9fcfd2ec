"""Times of the CUDA kernels on a GPU that is not there, from what can be counted without one."""
