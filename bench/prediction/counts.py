"""What a launch does, counted in a sample of its warps and scaled up to all of them."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from bench.prediction import h200
from bench.prediction.cache import Touch
from bench.prediction.cubin import Kernel
from bench.prediction.model import WarpWork
from bench.prediction.tensors import JOINED, Tensors
from bench.prediction.warp import Code, Follower, Launch, Trace

BLOCKS, WARPS = 5, 4
"""Of a launch and of a block, followed at most: the first, the last, and some evenly between."""
MIXED_BLOCKS, MIXED_WARPS = 17, 1
"""The same where blocks work on many tensors, some of which end within a block's part."""
LATENCIES = (h200.L2_LATENCY, h200.MEMORY_LATENCY)


@dataclass
class Stream:
    """All accesses to one tensor in one direction: of warps, sectors they touch, bytes of those that they use."""

    accesses: float = 0.0
    sectors: float = 0.0
    used_bytes: float = 0.0
    first_address: list[float] = field(default_factory=list)  # by sampled block

    @property
    def goes_backward(self) -> bool:
        return self.first_address[-1] < self.first_address[0]


@dataclass
class Counts:
    """Of a whole launch, as far as they are sums; cycles are a warp's, at the latencies above.

    last_block_cycles: what the launch's last block takes longer than the others, by the longest of its warps.
    streams: by the tensor's address and whether it is written.
    """

    warps: int
    issued: Counter[str]
    cycles: tuple[float, ...]
    last_block_cycles: tuple[float, ...]
    load_store: float
    bank_conflicts: float
    undecided: float
    unknown_accesses: float
    streams: dict[tuple[int, bool], Stream]

    @property
    def instructions(self) -> float:
        return sum(self.issued.values())

    @property
    def sector_bytes(self) -> float:
        """Bytes in the sectors that leave or reach the warps."""
        return h200.SECTOR_BYTES * sum(stream.sectors for stream in self.streams.values())

    @property
    def coalescing(self) -> float:
        """The share of them that is used; 1 without any."""
        return sum(s.used_bytes for s in self.streams.values()) / self.sector_bytes if self.sector_bytes else 1.0

    def touches(self, sizes: dict[int, int]) -> list[Touch]:
        """Each tensor's use, with no byte counted twice. sizes: bytes by address."""
        return [
            Touch(tensor, min(stream.sectors * h200.SECTOR_BYTES, sizes[tensor]), is_write, stream.goes_backward)
            for (tensor, is_write), stream in self.streams.items()
        ]

    def warp_work(self, memory_bytes: float, l2_bytes: float) -> WarpWork:
        """A warp's part, where so many bytes of the launch come from or go to memory and the rest to L2."""
        share = memory_bytes / (memory_bytes + l2_bytes) if memory_bytes + l2_bytes else 1.0
        return WarpWork(
            scheduler=scheduler_cycles(self.issued) / self.warps,
            load_store=self.load_store / self.warps,
            alone=self.cycles[0] * (1 - share) + self.cycles[1] * share,
            last_block=self.last_block_cycles[0],  # it reads what the others have just written
            memory_bytes=memory_bytes / self.warps,
            l2_bytes=l2_bytes / self.warps,
        )


def scheduler_cycles(issued: Counter[str]) -> float:
    """Cycles of a scheduler for these instructions: one each, or what the busiest of its units takes.

    Of the two halves that do fp32 arithmetic one does integer products as well.
    """
    cycles = {unit: issued[unit] * each for unit, each in h200.UNIT_CYCLES.items()}
    fused = max(cycles["imad"], issued["imad"] + cycles["fp32"])
    return max(sum(issued.values()), cycles["alu"], fused, cycles["special"], cycles["fp64"])


def spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, evenly, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def count(kernel: Kernel, launch: Launch, tensors: Tensors, is_joined: bool) -> Counts:
    """Follow a sample of the launch's warps.

    The last block may be shorter than the rest, so it stands for itself alone.

    Args:
        tensors: what streams are kept for; other memory is left out.
        is_joined: whether all tensors are one stream (there may be more of them than blocks in the sample).
    """
    code = Code(kernel.code)
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    warps_per_block = -(-launch.block[0] * launch.block[1] * launch.block[2] // h200.WARP)
    sampled = spread(blocks, MIXED_BLOCKS if is_joined else BLOCKS)
    warps = spread(warps_per_block, MIXED_WARPS if is_joined else WARPS)
    total = Counts(blocks * warps_per_block, Counter(), (), (), 0.0, 0.0, 0.0, 0.0, defaultdict(Stream))
    cycles, longest = np.zeros(len(LATENCIES)), np.zeros((len(sampled), len(LATENCIES)))
    with np.errstate(all="ignore"):
        for number, block in enumerate(sampled):
            of_blocks = 1.0 if block == blocks - 1 else (blocks - 1) / (len(sampled) - 1)
            seen: set[tuple[int, bool]] = set()
            for warp in warps:
                trace = Follower(code, launch, block, warp).follow(LATENCIES)
                weight = of_blocks * warps_per_block / len(warps)
                _add(total, trace, weight)
                cycles += weight * np.array(trace.cycles)
                longest[number] = np.maximum(longest[number], trace.cycles)
                _add_streams(total, trace, weight, tensors, is_joined, seen)
    total.cycles = tuple(cycles / total.warps)
    others = longest[:-1].mean(axis=0) if len(sampled) > 1 else longest[-1]
    total.last_block_cycles = tuple(np.maximum(longest[-1] - others, 0.0))
    return total


def _add(total: Counts, trace: Trace, weight: float) -> None:
    for unit, issued in trace.issued.items():
        total.issued[unit] += weight * issued  # pyright: ignore[reportArgumentType] - a Counter of floats
    sectors = sum(len(access.sectors()) for access in trace.accesses)
    total.load_store += weight * (sectors / h200.SECTORS_PER_CYCLE + trace.shared_turns + trace.issued["shuffle"])
    total.bank_conflicts += weight * trace.bank_conflicts
    total.undecided += weight * trace.undecided
    total.unknown_accesses += weight * trace.unknown_accesses


def _add_streams(
    total: Counts,
    trace: Trace,
    weight: float,
    tensors: Tensors,
    is_joined: bool,
    seen: set[tuple[int, bool]],
) -> None:
    for access in trace.accesses:
        first = int(access.addresses.min())
        begin = tensors.at(first)
        if begin is None:
            continue
        key = JOINED if is_joined else begin, access.is_write
        stream = total.streams[key]
        stream.accesses += weight
        stream.sectors += weight * len(access.sectors())
        stream.used_bytes += weight * access.used_bytes()
        if key not in seen:
            seen.add(key)
            stream.first_address.append(first)
