"""What all instructions have in common: where their results go, and that they are unknown if an operand is."""

from collections.abc import Callable

import numpy as np

from bench.prediction.registers import (
    LANES,
    MASK,
    NONE,
    UNKNOWN,
    Registers,
    Value,
    predicate_row,
    reader,
    row_of,
)
from bench.prediction.sass import Instruction

Effect = Callable[[Registers, np.ndarray], None]
"""Applies an instruction to the lanes that are active."""

TWO_32 = np.uint64(32)
WIDE_RESULTS = ("DADD", "DMUL", "DFMA")
NO_RESULT = ("ST", "STG", "STS", "STL", "BAR", "RED", "MEMBAR", "ERRBAR", "CCTL", "WARPSYNC", "NOP", "DEPBAR")


def forget_results(one: Instruction) -> Effect:
    """Result registers and predicates, the leading operands, become unknown."""
    if one.base in NO_RESULT or not one.operands:
        return lambda state, active: None
    predicates, rest = leading_predicates(one.operands)
    rows = _result_rows(one, rest[0]) if rest else []
    outs = [row for row in map(predicate_row, predicates) if row is not None]

    def apply(state: Registers, active: np.ndarray) -> None:
        for row in rows:
            state.write(row, UNKNOWN, active)
        for row in outs:
            state.write_predicate(row, NONE, NONE, active)

    return apply


def _result_rows(one: Instruction, operand: str) -> list[int]:
    row = row_of(operand)
    if row is None:
        return []
    count = 4 if ".128" in one.opcode else 2 if ".64" in one.opcode or one.base in WIDE_RESULTS else 1
    return [row + i for i in range(count)] if row % 256 != 255 and operand not in ("RZ", "URZ") else []


def leading_predicates(operands: tuple[str, ...]) -> tuple[list[str], list[str]]:
    count = 0
    while count < len(operands) and predicate_row(operands[count]) is not None:
        count += 1
    return list(operands[:count]), list(operands[count:])


def split_operands(one: Instruction) -> tuple[str, list[str], list[str], list[str]]:
    """Result register, predicates written, sources, predicates read."""
    result, rest = one.operands[0], list(one.operands[1:])
    outs, rest = leading_predicates(tuple(rest))
    sources = [text for text in rest if predicate_row(text) is None]
    return result, outs, sources, [text for text in rest if predicate_row(text) is not None]


def predicate_reader(text: str) -> Callable[[Registers], tuple[np.ndarray, np.ndarray]]:
    row = predicate_row(text)
    assert row is not None, text
    if text.startswith("!"):
        return lambda state: (~state.predicate_bits[row], state.predicate_known[row])
    return lambda state: (state.predicate_bits[row], state.predicate_known[row])


def writer(one: Instruction, result: str, pair: bool = False) -> Callable[[Registers, Value, np.ndarray], None]:
    row = row_of(result)
    assert row is not None, one
    return (
        (lambda state, value, active: state.write_pair(row, value, active))
        if pair
        else (lambda state, value, active: state.write(row, value, active))
    )


def simple_effect(
    one: Instruction,
    compute: Callable[..., np.ndarray],
    sizes: tuple[int, ...] = (),
    pair: bool = False,
    high: bool = False,
    floating: bool = False,
) -> Effect:
    """compute(bits of each source) gives the result's bits, and those beyond them as carries.

    Of two predicates written the first says that there is a carry, the second that there are two.

    Args:
        sizes: bytes of the sources, 4 each where it ends.
        pair: the result has 64 bits and goes to two registers; it carries if it is less than its last source.
        high: as pair, but only the upper word is kept.
    """
    result, outs, sources, carries = split_operands(one)
    readers = [reader(text, sizes[i] if i < len(sizes) else 4, floating) for i, text in enumerate(sources)]
    write, carry_row = writer(one, result, pair), [predicate_row(text) for text in outs]
    carry_in = [predicate_reader(text) for text in carries] if ".X" in one.opcode else []

    def apply(state: Registers, active: np.ndarray) -> None:
        values = [read(state) for read in readers]
        is_known = np.logical_and.reduce([value.known for value in values])
        bits = compute(*(value.bits for value in values))
        for read in carry_in:
            carry, carry_known = read(state)
            bits = bits + carry.astype(np.uint64)
            is_known = is_known & carry_known
        carries_out = (bits < values[-1].bits) if pair or high else bits >> TWO_32
        for number, row in enumerate(carry_row):
            if row is not None:
                state.write_predicate(row, carries_out > number, is_known, active)
        write(state, Value(bits >> TWO_32 if high else bits, is_known), active)

    return apply


def sign_extended(bits: np.ndarray) -> np.ndarray:
    return (bits & MASK).astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64)


def bits_known(value: Value) -> np.ndarray:
    """The known bits of a 32-bit value."""
    partly = value.known_bits if value.known_bits is not None else np.zeros(LANES, np.uint64)
    return np.where(value.known, MASK, partly)


def by_table(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The bitwise function of three whose values for abc = 000 to 111 are the table's bits."""
    out = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            out |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return out
