"""Times of the CUDA kernels on an H200 that is not there, from what can be counted without one.

`launches` has tests/cuda_on_cpu record what a case launches, `cubin` compiles the kernels, `sass` reads their machine
code, `warp` follows some warps through it, `counts` scales that to the launch, `model` makes a time of it, and `rows`
puts the launches of a case together. What the model is and where it errs: docs/performance.md.
"""
