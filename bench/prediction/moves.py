"""Instructions that only bring values elsewhere: copies, constants, choices, predicates in registers."""

import numpy as np

from bench.prediction.effects import Effect, bits_known, forget_results, predicate_reader, split_operands, writer
from bench.prediction.registers import LANES, MASK, Registers, Value, known, predicate_row, reader
from bench.prediction.sass import Instruction


def choose(one: Instruction, floating: bool = False) -> Effect:
    """SEL and FSEL: the first source where the predicate holds, else the second."""
    result, _, sources, conditions = split_operands(one)
    first, second, condition = (
        reader(sources[0], 4, floating),
        reader(sources[1], 4, floating),
        predicate_reader(conditions[0]),
    )
    write = writer(one, result)

    def apply(state: Registers, active: np.ndarray) -> None:
        a, b, (holds, is_known) = first(state), second(state), condition(state)
        chosen = Value(np.where(holds, a.bits, b.bits), np.where(holds, a.known, b.known) & is_known)
        write(state, chosen, active)

    return apply


def move(one: Instruction) -> Effect:
    sources = [text for text in one.operands[1:] if predicate_row(text) is None]
    read, write = reader(sources[0]), writer(one, one.operands[0])
    return lambda state, active: write(state, read(state), active)


def move_halves(one: Instruction) -> Effect:
    """HFMA2 of zeros plus two fp16 numbers: how ptxas writes some constants."""
    if len(one.operands) != 5 or [text.lstrip("-") for text in one.operands[1:3]] != ["RZ", "RZ"]:
        return forget_results(one)
    high, low = (int(np.array(float(text), np.float16).view(np.uint16)) for text in one.operands[3:])
    write, value = writer(one, one.operands[0]), known(high << 16 | low)
    return lambda state, active: write(state, value, active)


def pack_predicates(one: Instruction) -> Effect:
    """P2R: the register's bits, with predicates in the place of those in the mask."""
    if one.opcode != "P2R":
        return forget_results(one)
    read, mask, write = reader(one.operands[2]), int(one.operands[3], 0), writer(one, one.operands[0])
    rows = [row for row in range(7) if mask >> row]

    def apply(state: Registers, active: np.ndarray) -> None:
        value = read(state)
        bits, known_bits = value.bits & ~np.uint64(mask), bits_known(value) & ~np.uint64(mask)
        for row in rows:
            bits = bits | state.predicate_bits[row].astype(np.uint64) << np.uint64(row)
            known_bits = known_bits | state.predicate_known[row].astype(np.uint64) << np.uint64(row)
        is_known = known_bits == MASK
        write(state, Value(bits, is_known, None if is_known.all() else known_bits), active)

    return apply


def unpack_predicates(one: Instruction) -> Effect:
    """R2P: predicates from the bits of a register that are in the mask."""
    if one.opcode != "R2P":
        return forget_results(one)
    read, mask = reader(one.operands[1]), int(one.operands[2], 0)

    def apply(state: Registers, active: np.ndarray) -> None:
        value = read(state)
        for row in range(7):
            if mask >> row & 1:
                bit = np.uint64(1 << row)
                state.write_predicate(row, value.bits & bit > 0, bits_known(value) & bit > 0, active)

    return apply


def broadcast(one: Instruction) -> Effect:
    """R2UR: what the first active lane has."""
    result, _, sources, _ = split_operands(one)
    read, write = reader(sources[0]), writer(one, result)

    def apply(state: Registers, active: np.ndarray) -> None:
        value, lane = read(state), int(active.argmax())
        write(state, Value(np.full(LANES, value.bits[lane]), np.full(LANES, value.known[lane])), np.ones(LANES, bool))

    return apply


def clear(one: Instruction) -> Effect:
    """CS2R of SRZ is 0 in both words; clocks are not known."""
    if one.operands[1] != "SRZ":
        return forget_results(one)
    write = writer(one, one.operands[0], pair=".32" not in one.opcode)
    return lambda state, active: write(state, known(0), active)


def load_constant(one: Instruction) -> Effect:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8}
    size = next((sizes[word] for word in one.opcode.split(".") if word in sizes), 4)
    result, _, sources, _ = split_operands(one)
    read, write = reader(sources[0], size), writer(one, result, pair=size == 8)
    return lambda state, active: write(state, read(state), active)
