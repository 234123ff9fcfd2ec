"""Follows one warp through a kernel's machine code: what it issues, what memory it touches, how long it takes alone.

Branches are followed lane by lane; of the lanes of a warp that are apart, those that are behind go first, and all wait
where the code says that they meet (BSSY, BSYNC). A branch on something unknown is decided for all lanes alike: never
into a subroutine for numbers out of range (division and square root have them), never to the kernel's end, else onward;
how often that was done is counted. Where blocks count themselves in global memory, the last one of the launch is taken
to be the last to count: what is unknown ends all others.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from bench.prediction.accesses import GLOBAL, SHARED, WIDTHS, Access, address_reader, shared_turns
from bench.prediction.clock import Clock
from bench.prediction.registers import ALL, LANES, UNKNOWN, Registers, Value, predicate_row, row_of
from bench.prediction.sass import Instruction, pipe_of
from bench.prediction.semantics import Effect, effect_of
from sendvae_fast.errors import UserError

MAX_STEPS = 200_000  # of a warp
PARAMETERS = 0x210  # where they lie in constant bank 0, after launch sizes and pointers of the driver
FINISHED = 1 << 40
COUNTERS = ("ATOMG", "ATOM")
OUT_OF_RANGE = ("slowpath", "mediumpath", "f64_full")  # in names of subroutines


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched. parameters: the bytes of its arguments as they lie in constant memory."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    parameters: bytes

    def constants(self) -> bytes:
        sizes = np.array([*self.block, *self.grid], "<u4").tobytes()
        return sizes + bytes(PARAMETERS - len(sizes)) + self.parameters


@dataclass
class Trace:
    """What one warp did.

    cycles: alone, at the latencies of `follow`. undecided: branches on something unknown, where neither way leads to a
    subroutine for numbers out of range. unknown_accesses: at addresses that are not known.
    """

    issued: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    accesses: list[Access] = field(default_factory=list)
    shared_turns: int = 0
    bank_conflicts: int = 0
    cycles: list[float] = field(default_factory=list)
    undecided: int = 0
    unknown_accesses: int = 0


class Code:
    """A kernel's instructions, made ready to be followed by many warps."""

    def __init__(self, code: tuple[Instruction, ...]):
        self.code = code
        self.effects: list[Effect] = [effect_of(one) for one in code]
        self.pipes = [pipe_of(one) for one in code]
        self.guards = [(predicate_row(one.predicate), one.predicate.startswith("!")) for one in code]
        self.memory = [address_reader(one) if one.base in GLOBAL + SHARED else None for one in code]
        self.is_cold = [self._is_cold(index) for index in range(len(code))]
        self.counts_blocks = any(one.base in COUNTERS for one in code)

    def _is_cold(self, index: int) -> bool:
        """Whether what follows, without a choice, calls a subroutine for numbers out of range."""
        for one in self.code[index:]:
            if one.base == "CALL":
                return any(name in text for text in one.operands for name in OUT_OF_RANGE)
            if one.base in ("BRA", "EXIT", "BSYNC", "RET", "BRX"):
                return False
        return False


class Follower:
    """One warp on its way."""

    def __init__(self, code: Code, launch: Launch, block: int, warp: int):
        self.code, self.launch = code, launch
        self.state = Registers(launch.constants())
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        ids = np.arange(warp * LANES, (warp + 1) * LANES)
        self.pc = np.where(ids < threads, 0, FINISHED)
        x, y = launch.block[:2]
        grid_x, grid_y = launch.grid[:2]
        self.special = {
            "SR_TID.X": ids % x, "SR_TID.Y": ids // x % y, "SR_TID.Z": ids // x // y, "SR_LANEID": ids % LANES,
            "SR_CTAID.X": block % grid_x, "SR_CTAID.Y": block // grid_x % grid_y,
            "SR_CTAID.Z": block // grid_x // grid_y, "SR_CgaCtaId": 0,
        }  # fmt: skip
        self.ends_by_counter = code.counts_blocks and block + 1 < launch.grid[0] * launch.grid[1] * launch.grid[2]
        self.meeting: dict[str, np.ndarray] = {}  # the lanes that meet at a barrier B0 to B15
        self.waiting = np.zeros(LANES, bool)
        self.returns: list[int] = []
        self.trace = Trace()

    def follow(self, latencies: tuple[float, ...]) -> Trace:
        """Go to the end. latencies: cycles of a load from global memory, for each of which the way is timed."""
        clocks = [Clock(latency) for latency in latencies]
        for _ in range(MAX_STEPS):
            ready = np.where(self.waiting, FINISHED, self.pc)
            at = int(ready.min())
            if at >= FINISHED:
                self.trace.cycles = [clock.now for clock in clocks]
                return self.trace
            lanes, index = ready == at, at // 16
            one = self.code.code[index]
            self.trace.issued[self.code.pipes[index]] += 1
            self.trace.opcodes[one.base] += 1
            for clock in clocks:
                clock.issue(one)
            self._step(index, one, lanes)
        raise UserError(f"a warp does not end within {MAX_STEPS} instructions: its loop depends on what memory holds")

    def _step(self, index: int, one: Instruction, lanes: np.ndarray) -> None:
        active, sure = self._guarded(index, lanes)
        next_pc = one.address + 16
        base = one.base
        if base in ("BRA", "EXIT", "CALL", "RET", "BRX", "JMP"):
            self._branch(index, one, lanes, active, sure)
            return
        self.pc[lanes] = next_pc
        if base == "BSSY":
            self.meeting[one.operands[0]] = lanes.copy()
        elif base == "BSYNC":
            self._meet(one, lanes)
        elif base in ("S2R", "S2UR"):
            self._read_special(one, active)
        elif self.code.memory[index] is not None:
            self._access(index, one, active)
            self.code.effects[index](self.state, active)
        else:
            self.code.effects[index](self.state, active)
            if not sure:
                self._forget_results(one, active)

    def _guarded(self, index: int, lanes: np.ndarray) -> tuple[np.ndarray, bool]:
        """The lanes whose predicate holds, or is unknown, and whether it is known."""
        row, negated = self.code.guards[index]
        if row is None:
            return lanes, True
        is_known = self.state.predicate_known[row]
        holds = self.state.predicate_bits[row] ^ negated
        return lanes & (holds | ~is_known), bool(is_known[lanes].all())

    def _forget_results(self, one: Instruction, active: np.ndarray) -> None:
        row = row_of(one.operands[0]) if one.operands else None
        if row is not None:
            self.state.write(row, UNKNOWN, active)

    def _read_special(self, one: Instruction, active: np.ndarray) -> None:
        row, number = row_of(one.operands[0]), self.special.get(one.operands[1])
        assert row is not None
        value = UNKNOWN if number is None else Value(np.broadcast_to(number, LANES).astype(np.uint64), ALL)
        self.state.write(row, value, active)

    # ---- Control ----

    def _branch(self, index: int, one: Instruction, lanes: np.ndarray, active: np.ndarray, sure: bool) -> None:
        next_pc = one.address + 16
        if ".DIV" in one.opcode:  # only where lanes are apart, as they are not here
            self.pc[lanes] = next_pc
            return
        for text in one.operands:  # a second condition: BRA P2, target
            row = predicate_row(text)
            if row is not None:
                holds, is_known = self.state.predicate_bits[row], self.state.predicate_known[row]
                active = active & ((holds ^ text.startswith("!")) | ~is_known)
                sure = sure and bool(is_known[lanes].all())
        if one.base == "EXIT":
            target: int | None = FINISHED
        elif one.base == "RET":
            target = self._return_address(one, lanes)
        else:
            target = one.target
        if one.base == "CALL":
            self.returns.append(next_pc)
        if target is None:
            self.trace.undecided += 1
            target = next_pc
        if not sure:
            takes = self.ends_by_counter if one.base == "EXIT" else self._prefers_target(index, target)
            active = lanes if takes else np.zeros(LANES, bool)
        self.pc[lanes] = np.where(active[lanes], target, next_pc)
        self._release()

    def _prefers_target(self, index: int, target: int) -> bool:
        onward, there = self.code.is_cold[index + 1], self.code.is_cold[target // 16]
        self.trace.undecided += onward == there
        return onward and not there

    def _return_address(self, one: Instruction, lanes: np.ndarray) -> int | None:
        row = next((row for row in map(row_of, one.operands) if row is not None), None)
        value = self.state.read(row) if row is not None else UNKNOWN
        lane = int(lanes.argmax())
        last = self.returns.pop() if self.returns else None
        return int(value.bits[lane]) if value.known[lane] else last

    def _meet(self, one: Instruction, lanes: np.ndarray) -> None:
        members = self.meeting.get(one.operands[0])
        if members is None:
            return
        self.pc[lanes] = one.address  # until all are there
        self.waiting |= lanes
        self._release()

    def _release(self) -> None:
        """Lets lanes go on that wait where every other lane of their meeting waits or has ended."""
        for name, members in self.meeting.items():
            present = members & self.waiting
            if not present.any():
                continue
            places = np.unique(self.pc[present])
            arrived = present | (self.pc >= FINISHED)
            one = self.code.code[int(places[0]) // 16]
            if len(places) == 1 and one.operands[0] == name and (arrived | ~members).all():
                self.waiting &= ~present
                self.pc[present] += 16

    # ---- Memory ----

    def _access(self, index: int, one: Instruction, active: np.ndarray) -> None:
        read = self.code.memory[index]
        assert read is not None
        address = read(self.state)
        if not active.any():
            return
        if not address.known[active].all():
            self.trace.unknown_accesses += one.base not in COUNTERS  # theirs is known to the linker
            return
        width = next((WIDTHS[word] for word in one.opcode.split(".")[1:] if word in WIDTHS), 4)
        addresses = address.bits[active].astype(np.int64)
        if one.base in GLOBAL:
            is_write = one.base in ("STG", "ST", "RED", *COUNTERS)
            self.trace.accesses.append(Access(addresses, width, is_write))
        else:
            turns = shared_turns(addresses, width)
            self.trace.shared_turns += sum(turns)
            self.trace.bank_conflicts += sum(turn - 1 for turn in turns)
