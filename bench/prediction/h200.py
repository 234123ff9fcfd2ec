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
