"""Facts of an H200 that the predictions rest on, each with its source."""

# NVIDIA's data sheet and CUDA C++ Programming Guide, compute capability 9.0.
MULTIPROCESSORS = 132
SCHEDULERS = 4  # of a multiprocessor; each issues one warp instruction a cycle
MAX_WARPS = 64  # of a multiprocessor
MAX_BLOCKS = 32
REGISTERS = 65536
REGISTER_UNIT = 256  # registers are given to a warp in such pieces
SHARED_BYTES = 233472  # 228 KiB, of which each block costs one more KiB
SHARED_UNIT, SHARED_PER_BLOCK = 128, 1024
WARP = 32
SECTOR_BYTES = 32

# Read from such a machine: `nvidia-smi` under load, and a copy of 8.6 GB by PyTorch, read and written bytes together.
CLOCK_HZ = 1.98e9
COPY_BYTES_PER_S = 4.3e12

# Cycles from issue to result where a barrier tells the warp that it is there: Luo et al. 2024 (arXiv 2402.13499), table
# of latencies of an H100: shared memory 29, L2 263, device memory 479. Those of the special-function unit, shuffles and
# constants are not in it: what micro-benchmarks of earlier chips found (Jia et al. 2018), rounded.
L2_LATENCY, MEMORY_LATENCY = 263.0, 479.0
LATENCIES = {"LDS": 29.0, "SHFL": 23.0, "MUFU": 20.0, "S2R": 20.0, "S2UR": 20.0, "LDC": 30.0, "BAR": 20.0}
OTHER_LATENCY = 20.0
OPERAND_CYCLES = 10.0
