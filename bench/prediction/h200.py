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
# A fence is taken to wait for its writes to be in L2.
LATENCIES = {
    "LDS": 29.0, "SHFL": 23.0, "MUFU": 20.0, "S2R": 20.0, "S2UR": 20.0, "LDC": 30.0, "BAR": 20.0, "MEMBAR": L2_LATENCY,
}  # fmt: skip
OTHER_LATENCY = 20.0
OPERAND_CYCLES = 10.0

# Assumptions, none of them measured on an H200. L2: the data sheet's 50 MB, of which three quarters are ours; its
# bandwidth is what chipsandcheese.com read on an H100 PCIe (2023), 5.6 TB/s. Between two kernels of a CUDA graph, of
# which the second needs the first, about a microsecond passes.
L2_USABLE_BYTES = 0.75 * 50e6
L2_BYTES_PER_S = 5.6e12
LAUNCH_S = 1.0e-6

# Cycles of a scheduler that a warp instruction keeps its unit busy: 32 lanes over the unit's lanes (Programming Guide,
# throughput of native arithmetic instructions, 9.0). Integers and comparisons have 16 lanes of a scheduler, and so has
# IMAD; the special-function unit and conversions have 4; double precision has 16. A barrier or branch costs its issue.
UNIT_CYCLES = {"alu": 2.0, "imad": 2.0, "special": 8.0, "fp64": 2.0, "fp32": 1.0}
SECTORS_PER_CYCLE = 4.0  # of the load-store unit: 128 bytes
