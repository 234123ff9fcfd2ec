"""Integer and bitwise instructions."""

import numpy as np

from bench.prediction.effects import (
    TWO_32,
    Effect,
    bits_known,
    by_table,
    forget_results,
    leading_predicates,
    predicate_reader,
    sign_extended,
    simple_effect,
    split_operands,
    writer,
)
from bench.prediction.registers import LANES, MASK, Registers, Value, predicate_row, reader, row_of
from bench.prediction.sass import Instruction


def imad(one: Instruction) -> Effect:
    words = one.opcode.split(".")[1:]
    unsigned = "U32" in words
    if "WIDE" in words or "HI" in words:
        extend = (lambda x: x & MASK) if unsigned else sign_extended

        if "HI" in words and not unsigned:
            return forget_results(one)  # the high word of a signed product does not fit what is computed here
        return simple_effect(
            one,
            lambda a, b, c: extend(a) * extend(b) + c,
            (4, 4, 8),
            pair="WIDE" in words,
            high="HI" in words,
        )
    return simple_effect(one, lambda a, b, c: (a & MASK) * (b & MASK) + (c if "X" in words else c & MASK))


def iadd3(one: Instruction) -> Effect:
    return simple_effect(one, lambda *terms: np.add.reduce(terms))


def lea(one: Instruction) -> Effect:
    words = one.opcode.split(".")[1:]
    if "HI" not in words:
        return simple_effect(one, lambda a, b, shift: (a << shift & MASK) + b)
    if "SX32" in words:
        return simple_effect(one, lambda a, b, shift: (sign_extended(a) << shift >> TWO_32) + (b & MASK))
    return simple_effect(one, lambda a, b, c, shift: ((c << TWO_32 | a & MASK) << shift >> TWO_32) + (b & MASK))


def shf(one: Instruction) -> Effect:
    words = one.opcode.split(".")[1:]
    left, high, signed = "L" in words, "HI" in words, "S32" in words or "S64" in words

    def shift(low: np.ndarray, by: np.ndarray, upper: np.ndarray) -> np.ndarray:
        both = upper << TWO_32 | low & MASK
        by = np.minimum(by, np.uint64(63)) if "W" not in words else by & np.uint64(31)
        if left:
            moved = both << by
        elif signed:
            moved = (both.view(np.int64) >> by.view(np.int64)).view(np.uint64)
        else:
            moved = both >> by
        return moved >> TWO_32 if high else moved & MASK

    return simple_effect(one, shift)


def lop3(one: Instruction) -> Effect:
    predicates, rest = leading_predicates(one.operands)
    if row_of(rest[0]) is not None and not predicates:
        result, outs, sources, _ = split_operands(one)
    else:
        result, outs, sources = rest[0], predicates, [text for text in rest[1:] if predicate_row(text) is None]
    readers, table = [reader(text) for text in sources[:3]], int(sources[3], 0)
    write, rows = writer(one, result), [predicate_row(text) for text in outs]

    def apply(state: Registers, active: np.ndarray) -> None:
        values = [read(state) for read in readers]
        bits = by_table(table, *(value.bits & MASK for value in values)) & MASK
        known_bits = _known_bits(table, values)
        is_known = known_bits == MASK
        write(state, Value(bits, is_known, None if is_known.all() else known_bits), active)
        for row in rows:
            if row is not None:
                state.write_predicate(row, bits != 0, is_known | (bits & known_bits > 0), active)

    return apply


def _known_bits(table: int, values: list[Value]) -> np.ndarray:
    """The bits of the table's result that are the same whatever the unknown bits of its inputs are."""
    if all(value.known.all() for value in values):
        return np.full(LANES, MASK)
    choices = [(value.bits & bits_known(value), (value.bits | ~bits_known(value)) & MASK) for value in values]
    results = [by_table(table, a, b, c) & MASK for a in choices[0] for b in choices[1] for c in choices[2]]
    return ~(np.bitwise_or.reduce(results) ^ np.bitwise_and.reduce(results)) & MASK


def prmt(one: Instruction) -> Effect:
    def permute(a: np.ndarray, selector: np.ndarray, b: np.ndarray) -> np.ndarray:
        both, out = (b & MASK) << TWO_32 | a & MASK, np.zeros(LANES, np.uint64)
        for i in range(4):
            choice = selector >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(choice & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
            out |= byte << np.uint64(8 * i)
        return out

    return simple_effect(one, permute)


def min_max(one: Instruction) -> Effect:
    """IMNMX and VIMNMX: the minimum where the predicate holds, else the maximum."""
    result, _, sources, conditions = split_operands(one)
    readers, condition, write = [reader(text) for text in sources], predicate_reader(conditions[0]), writer(one, result)
    signed = "U32" not in one.opcode

    def apply(state: Registers, active: np.ndarray) -> None:
        a, b = (read(state) for read in readers)
        holds, is_known = condition(state)
        x, y = (a.signed, b.signed) if signed else (a.bits & MASK, b.bits & MASK)
        bits = np.where(holds, np.minimum(x, y), np.maximum(x, y)).astype(np.int64).view(np.uint64)
        write(state, Value(bits, a.known & b.known & is_known), active)

    return apply


def iabs(one: Instruction) -> Effect:
    return simple_effect(one, lambda a: np.abs(sign_extended(a).view(np.int64)).view(np.uint64))
