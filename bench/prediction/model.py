"""The time of a kernel on an H200 from what its warps do: pure functions of counts.

A multiprocessor is a closed queueing network, whose customers are the warps that it holds at once. A warp needs its
scheduler for as many cycles as it issues instructions (or as the busiest of the scheduler's units takes for them), the
multiprocessor's load-store unit, and its share of the memory's bandwidth; in between it waits, for its own results and
for memory, without keeping others from anything. Exact mean value analysis (Reiser and Lavenberg 1980) gives how many
warps a cycle such a network finishes. With few warps that is latency (Little's law), with many the busiest station's
rate; where two stations are equally busy it is less than either.

What it leaves out: the order in which ptxas and the hardware issue, register banks, caches of instructions and of
constants, the pages of device memory, and that times are less random than the analysis has them, so that a kernel with
two equal bounds may be faster than predicted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.prediction import h200

BYTES_PER_CYCLE = h200.COPY_BYTES_PER_S / h200.CLOCK_HZ / h200.MULTIPROCESSORS
L2_BYTES_PER_CYCLE = h200.L2_BYTES_PER_S / h200.CLOCK_HZ / h200.MULTIPROCESSORS


@dataclass(frozen=True)
class WarpWork:
    """What one warp needs, on average over a launch. In cycles, but for bytes.

    scheduler: of its scheduler. load_store: of the multiprocessor's load-store unit. alone: from its first instruction
    to its last if nobody else is there. memory_bytes, l2_bytes: from and to device memory, and from the L2 cache.
    last_block: what the launch's last block takes longer than the others, when these have ended.
    """

    scheduler: float
    load_store: float
    alone: float
    memory_bytes: float
    l2_bytes: float
    last_block: float = 0.0

    @property
    def memory(self) -> float:
        """Cycles of the multiprocessor's share of the memory's and the L2 cache's bandwidth."""
        return self.memory_bytes / BYTES_PER_CYCLE + self.l2_bytes / L2_BYTES_PER_CYCLE

    @property
    def demands(self) -> tuple[float, ...]:
        """Cycles at each station of a multiprocessor: its schedulers, of which a warp has one; load-store; memory."""
        return (*[self.scheduler / h200.SCHEDULERS] * h200.SCHEDULERS, self.load_store, self.memory)

    @property
    def think(self) -> float:
        """Cycles of waiting that keep nobody from anything."""
        return max(0.0, self.alone - self.scheduler)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a launch, and what each of its bounds alone would be."""

    seconds: float
    memory_s: float
    issue_s: float
    load_store_s: float
    latency_s: float

    @property
    def bound(self) -> str:
        """The largest bound's name."""
        bounds = {
            "memory": self.memory_s, "issue": self.issue_s, "load-store": self.load_store_s, "latency": self.latency_s,
        }  # fmt: skip
        return max(bounds, key=lambda name: bounds[name])


def throughput(demands: Sequence[float], think: float, most: int) -> list[float]:
    """Customers a cycle that a closed network finishes, with 1 to `most` of them in it.

    demands: cycles of a customer at each station, where one is served after the other. think: elsewhere.
    """
    queues = [0.0] * len(demands)
    rates = []
    for customers in range(1, most + 1):
        times = [demand * (1 + queue) for demand, queue in zip(demands, queues, strict=True)]
        rate = customers / (think + sum(times))
        queues = [rate * time for time in times]
        rates.append(rate)
    return rates


def predict(work: WarpWork, warps_per_block: int, resident: int, blocks: int) -> Prediction:
    """The time of a launch of so many blocks, `resident` of which a multiprocessor holds at once.

    The busiest multiprocessor is full until its last blocks run out one after the other, with less and less company.
    A last block that has more to do than the others, because it joins what they left, does that alone.
    """
    per_unit = -(-blocks // h200.MULTIPROCESSORS)
    together = min(resident, per_unit)
    rates = throughput(work.demands, work.think, together * warps_per_block)
    block_rates = [rates[count * warps_per_block - 1] / warps_per_block for count in range(1, together + 1)]
    even = blocks / h200.MULTIPROCESSORS
    cycles = max(even - together, 0) / block_rates[-1] + sum(1 / rate for rate in block_rates) + work.last_block
    warps = even * warps_per_block
    return Prediction(
        seconds=cycles / h200.CLOCK_HZ + h200.LAUNCH_S,
        memory_s=warps * work.memory / h200.CLOCK_HZ,
        issue_s=warps * work.scheduler / h200.SCHEDULERS / h200.CLOCK_HZ,
        load_store_s=warps * work.load_store / h200.CLOCK_HZ,
        latency_s=warps * work.alone / (together * warps_per_block) / h200.CLOCK_HZ,
    )


def copy_seconds(bytes_moved: int) -> float:
    """The time of a copy that reads and writes so many bytes together."""
    return h200.LAUNCH_S + bytes_moved / h200.COPY_BYTES_PER_S
