"""Instructions whose results are predicates."""

import numpy as np

from bench.prediction.effects import Effect, by_table, leading_predicates, predicate_reader
from bench.prediction.registers import MASK, NONE, Registers, predicate_row, reader
from bench.prediction.sass import Instruction

COMPARISONS = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
    "LTU": np.less, "LEU": np.less_equal, "GTU": np.greater, "GEU": np.greater_equal, "NEU": np.not_equal,
}  # fmt: skip


def compare(one: Instruction) -> Effect:
    """ISETP and FSETP: the comparison, joined with a predicate; .EX continues one of the lower words."""
    words = one.opcode.split(".")[1:]
    floating = one.base == "FSETP"
    outs, rest = leading_predicates(one.operands)
    sources = [reader(text, 4, floating) for text in rest[:2]]
    joins = [predicate_reader(text) for text in rest[2:]]
    rows, compare = [predicate_row(text) for text in outs], COMPARISONS[words[0]]
    join = next(word for word in words if word in ("AND", "OR", "XOR"))
    signed, extended = "U32" not in words, "EX" in words

    def apply(state: Registers, active: np.ndarray) -> None:
        a, b = (read(state) for read in sources)
        is_known = a.known & b.known
        if floating:
            holds = compare(a.floats, b.floats)
        else:
            x, y = (a.signed, b.signed) if signed else (a.bits & MASK, b.bits & MASK)
            holds = compare(x, y)
            if extended:
                lower, lower_known = joins[1](state)
                strict = COMPARISONS[words[0][:1] + ("T" if words[0][0] in "LG" else words[0][1])](x, y)
                holds = np.where(x == y, lower, strict)
                is_known = is_known & (lower_known | (x != y))
        other, other_known = joins[0](state)
        results = [_joined(join, holds, other), _joined(join, ~holds, other)]
        settled = (~other if join == "AND" else other if join == "OR" else NONE) & other_known
        is_known = is_known & other_known | settled
        for row, bits in zip(rows, results, strict=False):
            if row is not None:
                state.write_predicate(row, bits, is_known, active)

    return apply


def _joined(join: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a & b if join == "AND" else a | b if join == "OR" else a ^ b


def plop3(one: Instruction) -> Effect:
    outs = [predicate_row(text) for text in one.operands[:2]]
    inputs = [predicate_reader(text) for text in one.operands[2:5]]
    tables = [int(text, 0) for text in one.operands[5:7]]

    def apply(state: Registers, active: np.ndarray) -> None:
        values = [read(state) for read in inputs]
        is_known = np.logical_and.reduce([known_ for _, known_ in values])
        for row, table in zip(outs, tables, strict=False):
            if row is not None:
                bits = by_table(table, *(bits for bits, _ in values))
                state.write_predicate(row, bits, is_known, active)

    return apply
