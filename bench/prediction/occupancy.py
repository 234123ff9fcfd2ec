"""How many blocks a multiprocessor of an H200 holds at once, by the rules of CUDA's occupancy calculator."""

from math import ceil

from bench.prediction import h200


def resident_blocks(threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks of so many threads of so many registers, with so much shared memory each; 0: none can run."""
    warps = ceil(threads / h200.WARP)
    of_warp = round_up(registers * h200.WARP, h200.REGISTER_UNIT)
    warps_by_registers = h200.SCHEDULERS * (h200.REGISTERS // h200.SCHEDULERS // max(1, of_warp))
    shared = round_up(shared_bytes, h200.SHARED_UNIT) + h200.SHARED_PER_BLOCK
    return min(h200.MAX_BLOCKS, h200.MAX_WARPS // warps, warps_by_registers // warps, h200.SHARED_BYTES // shared)


def round_up(value: int, unit: int) -> int:
    return ceil(value / unit) * unit
