"""What SASS instructions do to a warp's registers, as far as addresses and branches depend on them.

An instruction that is not here makes its result unknown. Meanings are those of the public PTX instructions that ptxas
translates to them; in tests they are compared with plain arithmetic, and executed addresses with the known tensors.
"""

from collections.abc import Callable

import numpy as np

from bench.prediction.registers import (
    LANES,
    MASK,
    NONE,
    UNKNOWN,
    Registers,
    Value,
    known,
    predicate_row,
    reader,
    row_of,
)
from bench.prediction.sass import Instruction

Effect = Callable[[Registers, np.ndarray], None]
"""Applies an instruction to the lanes that are active."""

TWO_32 = np.uint64(32)
COMPARISONS = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
    "LTU": np.less, "LEU": np.less_equal, "GTU": np.greater, "GEU": np.greater_equal, "NEU": np.not_equal,
}  # fmt: skip
WIDE_RESULTS = ("DADD", "DMUL", "DFMA")
NO_RESULT = (
    "ST",
    "STG",
    "STS",
    "STL",
    "BAR",
    "RED",
    "MEMBAR",
    "ERRBAR",
    "CCTL",
    "WARPSYNC",
    "NOP",
    "DEPBAR",
    "NANOSLEEP",
)


def effect_of(one: Instruction) -> Effect:
    """What the instruction does, its predicate left aside."""
    return BUILDERS.get(one.base.removeprefix("U"), _forget)(one)


def _forget(one: Instruction) -> Effect:
    """Result registers and predicates, the leading operands, become unknown."""
    if one.base in NO_RESULT or not one.operands:
        return lambda state, active: None
    predicates, rest = _leading_predicates(one.operands)
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


def _leading_predicates(operands: tuple[str, ...]) -> tuple[list[str], list[str]]:
    count = 0
    while count < len(operands) and predicate_row(operands[count]) is not None:
        count += 1
    return list(operands[:count]), list(operands[count:])


def _split(one: Instruction) -> tuple[str, list[str], list[str], list[str]]:
    """Result register, predicates written, sources, predicates read."""
    result, rest = one.operands[0], list(one.operands[1:])
    outs, rest = _leading_predicates(tuple(rest))
    sources = [text for text in rest if predicate_row(text) is None]
    return result, outs, sources, [text for text in rest if predicate_row(text) is not None]


def _predicate(text: str) -> Callable[[Registers], tuple[np.ndarray, np.ndarray]]:
    row = predicate_row(text)
    assert row is not None, text
    if text.startswith("!"):
        return lambda state: (~state.predicate_bits[row], state.predicate_known[row])
    return lambda state: (state.predicate_bits[row], state.predicate_known[row])


def _write_to(one: Instruction, result: str, pair: bool = False) -> Callable[[Registers, Value, np.ndarray], None]:
    row = row_of(result)
    assert row is not None, one
    return (
        (lambda state, value, active: state.write_pair(row, value, active))
        if pair
        else (lambda state, value, active: state.write(row, value, active))
    )


def _simple(
    one: Instruction,
    compute: Callable[..., np.ndarray],
    sizes: tuple[int, ...] = (),
    pair: bool = False,
    floating: bool = False,
) -> Effect:
    """compute(bits of each source) gives the result's bits."""
    result, outs, sources, carries = _split(one)
    readers = [reader(text, sizes[i] if i < len(sizes) else 4, floating) for i, text in enumerate(sources)]
    write, carry_row = _write_to(one, result, pair), [predicate_row(text) for text in outs]
    carry_in = [_predicate(text) for text in carries] if ".X" in one.opcode else []

    def apply(state: Registers, active: np.ndarray) -> None:
        values = [read(state) for read in readers]
        is_known = np.logical_and.reduce([value.known for value in values])
        bits = compute(*(value.bits for value in values))
        for read in carry_in:
            carry, carry_known = read(state)
            bits = bits + carry.astype(np.uint64)
            is_known = is_known & carry_known
        for row in carry_row:
            if row is not None:
                overflow = bits < values[-1].bits if pair else bits >> TWO_32 > 0
                state.write_predicate(row, overflow, is_known, active)
        write(state, Value(bits, is_known), active)

    return apply


def _sign_extended(bits: np.ndarray) -> np.ndarray:
    return (bits & MASK).astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64)


# ---- Integers ----


def _imad(one: Instruction) -> Effect:
    words = one.opcode.split(".")[1:]
    unsigned = "U32" in words
    if "WIDE" in words or "HI" in words:
        extend = (lambda x: x & MASK) if unsigned else _sign_extended

        def wide(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            total = extend(a) * extend(b) + c
            return total if "WIDE" in words else total >> TWO_32

        if "HI" in words and not unsigned:
            return _forget(one)  # the high word of a signed product does not fit what is computed here
        return _simple(one, wide, (4, 4, 8), pair="WIDE" in words)
    return _simple(one, lambda a, b, c: (a & MASK) * (b & MASK) + (c if "X" in words else c & MASK))


def _iadd3(one: Instruction) -> Effect:
    return _simple(one, lambda *terms: np.add.reduce(terms))


def _lea(one: Instruction) -> Effect:
    words = one.opcode.split(".")[1:]
    if "HI" not in words:
        return _simple(one, lambda a, b, shift: (a << shift & MASK) + b)
    if "SX32" in words:
        return _simple(one, lambda a, b, shift: (_sign_extended(a) << shift >> TWO_32) + (b & MASK))
    return _simple(one, lambda a, b, c, shift: ((c << TWO_32 | a & MASK) << shift >> TWO_32) + (b & MASK))


def _shf(one: Instruction) -> Effect:
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

    return _simple(one, shift)


def _lop3(one: Instruction) -> Effect:
    predicates, rest = _leading_predicates(one.operands)
    if row_of(rest[0]) is not None and not predicates:
        result, outs, sources, _ = _split(one)
    else:
        result, outs, sources = rest[0], predicates, [text for text in rest[1:] if predicate_row(text) is None]
    readers, table = [reader(text) for text in sources[:3]], int(sources[3], 0)
    write, rows = _write_to(one, result), [predicate_row(text) for text in outs]

    def apply(state: Registers, active: np.ndarray) -> None:
        values = [read(state) for read in readers]
        bits = _by_table(table, *(value.bits & MASK for value in values)) & MASK
        known_bits = _known_bits(table, values)
        is_known = known_bits == MASK
        write(state, Value(bits, is_known, None if is_known.all() else known_bits), active)
        for row in rows:
            if row is not None:
                state.write_predicate(row, bits != 0, is_known | (bits & known_bits > 0), active)

    return apply


def _bits_known(value: Value) -> np.ndarray:
    """The known bits of a 32-bit value."""
    partly = value.known_bits if value.known_bits is not None else np.zeros(LANES, np.uint64)
    return np.where(value.known, MASK, partly)


def _known_bits(table: int, values: list[Value]) -> np.ndarray:
    """The bits of the table's result that are the same whatever the unknown bits of its inputs are."""
    if all(value.known.all() for value in values):
        return np.full(LANES, MASK)
    choices = [(value.bits & _bits_known(value), (value.bits | ~_bits_known(value)) & MASK) for value in values]
    results = [_by_table(table, a, b, c) & MASK for a in choices[0] for b in choices[1] for c in choices[2]]
    return ~(np.bitwise_or.reduce(results) ^ np.bitwise_and.reduce(results)) & MASK


def _by_table(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The bitwise function of three whose values for abc = 000 to 111 are the table's bits."""
    out = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            out |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return out


def _prmt(one: Instruction) -> Effect:
    def permute(a: np.ndarray, selector: np.ndarray, b: np.ndarray) -> np.ndarray:
        both, out = (b & MASK) << TWO_32 | a & MASK, np.zeros(LANES, np.uint64)
        for i in range(4):
            choice = selector >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(choice & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
            out |= byte << np.uint64(8 * i)
        return out

    return _simple(one, permute)


def _choose(one: Instruction, floating: bool = False) -> Effect:
    """SEL and FSEL: the first source where the predicate holds, else the second."""
    result, _, sources, conditions = _split(one)
    first, second, condition = (
        reader(sources[0], 4, floating),
        reader(sources[1], 4, floating),
        _predicate(conditions[0]),
    )
    write = _write_to(one, result)

    def apply(state: Registers, active: np.ndarray) -> None:
        a, b, (holds, is_known) = first(state), second(state), condition(state)
        chosen = Value(np.where(holds, a.bits, b.bits), np.where(holds, a.known, b.known) & is_known)
        write(state, chosen, active)

    return apply


def _min_max(one: Instruction) -> Effect:
    """IMNMX and VIMNMX: the minimum where the predicate holds, else the maximum."""
    result, _, sources, conditions = _split(one)
    readers, condition, write = [reader(text) for text in sources], _predicate(conditions[0]), _write_to(one, result)
    signed = "U32" not in one.opcode

    def apply(state: Registers, active: np.ndarray) -> None:
        a, b = (read(state) for read in readers)
        holds, is_known = condition(state)
        x, y = (a.signed, b.signed) if signed else (a.bits & MASK, b.bits & MASK)
        bits = np.where(holds, np.minimum(x, y), np.maximum(x, y)).astype(np.int64).view(np.uint64)
        write(state, Value(bits, a.known & b.known & is_known), active)

    return apply


def _iabs(one: Instruction) -> Effect:
    return _simple(one, lambda a: np.abs(_sign_extended(a).view(np.int64)).view(np.uint64))


def _move(one: Instruction) -> Effect:
    sources = [text for text in one.operands[1:] if predicate_row(text) is None]
    read, write = reader(sources[0]), _write_to(one, one.operands[0])
    return lambda state, active: write(state, read(state), active)


def _move_halves(one: Instruction) -> Effect:
    """HFMA2 of zeros plus two fp16 numbers: how ptxas writes some constants."""
    if len(one.operands) != 5 or [text.lstrip("-") for text in one.operands[1:3]] != ["RZ", "RZ"]:
        return _forget(one)
    high, low = (int(np.array(float(text), np.float16).view(np.uint16)) for text in one.operands[3:])
    write, value = _write_to(one, one.operands[0]), known(high << 16 | low)
    return lambda state, active: write(state, value, active)


def _pack_predicates(one: Instruction) -> Effect:
    """P2R: the register's bits, with predicates in the place of those in the mask."""
    if one.opcode != "P2R":
        return _forget(one)
    read, mask, write = reader(one.operands[2]), int(one.operands[3], 0), _write_to(one, one.operands[0])
    rows = [row for row in range(7) if mask >> row]

    def apply(state: Registers, active: np.ndarray) -> None:
        value = read(state)
        bits, known_bits = value.bits & ~np.uint64(mask), _bits_known(value) & ~np.uint64(mask)
        for row in rows:
            bits = bits | state.predicate_bits[row].astype(np.uint64) << np.uint64(row)
            known_bits = known_bits | state.predicate_known[row].astype(np.uint64) << np.uint64(row)
        is_known = known_bits == MASK
        write(state, Value(bits, is_known, None if is_known.all() else known_bits), active)

    return apply


def _unpack_predicates(one: Instruction) -> Effect:
    """R2P: predicates from the bits of a register that are in the mask."""
    if one.opcode != "R2P":
        return _forget(one)
    read, mask = reader(one.operands[1]), int(one.operands[2], 0)

    def apply(state: Registers, active: np.ndarray) -> None:
        value = read(state)
        for row in range(7):
            if mask >> row & 1:
                bit = np.uint64(1 << row)
                state.write_predicate(row, value.bits & bit > 0, _bits_known(value) & bit > 0, active)

    return apply


def _broadcast(one: Instruction) -> Effect:
    """R2UR: what the first active lane has."""
    result, _, sources, _ = _split(one)
    read, write = reader(sources[0]), _write_to(one, result)

    def apply(state: Registers, active: np.ndarray) -> None:
        value, lane = read(state), int(active.argmax())
        write(state, Value(np.full(LANES, value.bits[lane]), np.full(LANES, value.known[lane])), np.ones(LANES, bool))

    return apply


def _clear(one: Instruction) -> Effect:
    """CS2R of SRZ is 0 in both words; clocks are not known."""
    if one.operands[1] != "SRZ":
        return _forget(one)
    write = _write_to(one, one.operands[0], pair=".32" not in one.opcode)
    return lambda state, active: write(state, known(0), active)


def _load_constant(one: Instruction) -> Effect:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8}
    size = next((sizes[word] for word in one.opcode.split(".") if word in sizes), 4)
    result, _, sources, _ = _split(one)
    read, write = reader(sources[0], size), _write_to(one, result, pair=size == 8)
    return lambda state, active: write(state, read(state), active)


# ---- Comparisons ----


def _compare(one: Instruction) -> Effect:
    """ISETP and FSETP: the comparison, joined with a predicate; .EX continues one of the lower words."""
    words = one.opcode.split(".")[1:]
    floating = one.base == "FSETP"
    outs, rest = _leading_predicates(one.operands)
    sources = [reader(text, 4, floating) for text in rest[:2]]
    joins = [_predicate(text) for text in rest[2:]]
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


def _plop3(one: Instruction) -> Effect:
    outs = [predicate_row(text) for text in one.operands[:2]]
    inputs = [_predicate(text) for text in one.operands[2:5]]
    tables = [int(text, 0) for text in one.operands[5:7]]

    def apply(state: Registers, active: np.ndarray) -> None:
        values = [read(state) for read in inputs]
        is_known = np.logical_and.reduce([known_ for _, known_ in values])
        for row, table in zip(outs, tables, strict=False):
            if row is not None:
                bits = _by_table(table, *(bits for bits, _ in values))
                state.write_predicate(row, bits, is_known, active)

    return apply


# ---- Floating-point numbers, which integer division goes through ----


def _float_result(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32).astype(np.uint64)


def _floats(bits: np.ndarray) -> np.ndarray:
    return (bits & MASK).astype(np.uint32).view(np.float32)


def _fadd(one: Instruction) -> Effect:
    return _simple(one, lambda a, b: _float_result(_floats(a) + _floats(b)), floating=True)


def _fmul(one: Instruction) -> Effect:
    return _simple(one, lambda a, b: _float_result(_floats(a) * _floats(b)), floating=True)


def _ffma(one: Instruction) -> Effect:
    def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return _float_result(_floats(a).astype(np.float64) * _floats(b) + _floats(c))

    return _simple(one, fused, floating=True)


def _mufu(one: Instruction) -> Effect:
    if one.opcode != "MUFU.RCP":
        return _forget(one)
    return _simple(one, lambda a: _float_result(1 / _floats(a)), floating=True)


def _to_float(one: Instruction) -> Effect:
    words = one.opcode.split(".")
    if any(word in words for word in ("F64", "F16", "U8", "U16", "S8", "S16")):
        return _forget(one)
    wide, signed = "U64" in words or "S64" in words, "U32" not in words and "U64" not in words

    def convert(a: np.ndarray) -> np.ndarray:
        exact = a if wide else _sign_extended(a).view(np.int64) if signed else a & MASK
        rounded = exact.astype(np.float32)
        if "RP" in words:  # up
            rounded = np.where(rounded.astype(np.float64) < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
        return _float_result(rounded)

    return _simple(one, convert, (8,) if wide else ())


def _to_integer(one: Instruction) -> Effect:
    words = one.opcode.split(".")
    if "F64" in words or "TRUNC" not in words:
        return _forget(one)
    wide = "U64" in words or "S64" in words

    def convert(a: np.ndarray) -> np.ndarray:
        top = 2.0**64 - 2048 if wide else 2.0**32 - 1
        return np.clip(np.nan_to_num(_floats(a).astype(np.float64)), 0, top).astype(np.uint64)

    return _simple(one, convert, pair=wide, floating=True)


BUILDERS: dict[str, Callable[[Instruction], Effect]] = {
    "IMAD": _imad,
    "IADD3": _iadd3,
    "IADD": _iadd3,
    "VIADD": _iadd3,
    "LEA": _lea,
    "SHF": _shf,
    "LOP3": _lop3,
    "PRMT": _prmt,
    "SEL": _choose,
    "FSEL": lambda one: _choose(one, floating=True),
    "IMNMX": _min_max,
    "VIMNMX": _min_max,
    "IABS": _iabs,
    "MOV": _move,
    "HFMA2": _move_halves,
    "P2R": _pack_predicates,
    "R2P": _unpack_predicates,
    "R2UR": _broadcast,
    "CS2R": _clear,
    "LDC": _load_constant,
    "ISETP": _compare,
    "FSETP": _compare,
    "PLOP3": _plop3,
    "FADD": _fadd,
    "FMUL": _fmul,
    "FFMA": _ffma,
    "MUFU": _mufu,
    "I2F": _to_float,
    "I2FP": _to_float,
    "F2I": _to_integer,
}
