"""The time of a warp that has its scheduler to itself."""

from bench.prediction import h200
from bench.prediction.accesses import GLOBAL
from bench.prediction.sass import NO_BARRIER, Instruction


class Clock:
    """Cycles of a warp that has its scheduler to itself, by the scheduling that ptxas wrote into the code."""

    def __init__(self, global_latency: float):
        self.now = 0.0
        self.released = [0.0] * 6
        self.global_latency = global_latency

    def issue(self, one: Instruction) -> None:
        for barrier in range(6):
            if one.waits >> barrier & 1:
                self.now = max(self.now, self.released[barrier])
        if one.write_barrier != NO_BARRIER:
            latency = self._latency(one)
            self.released[one.write_barrier] = max(self.released[one.write_barrier], self.now + latency)
        if one.read_barrier != NO_BARRIER:
            held = self.now + h200.OPERAND_CYCLES
            self.released[one.read_barrier] = max(self.released[one.read_barrier], held)
        self.now += max(1, one.stall)

    def _latency(self, one: Instruction) -> float:
        if one.base in GLOBAL:
            return self.global_latency
        return h200.LATENCIES.get(one.base, h200.OTHER_LATENCY)
