"""The state of a warp whose machine code is followed on the CPU: 32 lanes of values that are known or not.

What a kernel reads from global or shared memory is not there, and most of it only goes into floating-point numbers. So
every value carries a mark whether it is known; what depends on an unknown one is unknown.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LANES = 32
ZERO, UNIFORM = 255, 256  # the row that is always 0, and the first of the uniform registers
UNIFORM_ZERO = UNIFORM + 63
TRUE, UNIFORM_TRUE = 7, 15
MASK = np.uint64(0xFFFFFFFF)

REGISTER = re.compile(r"(?P<unary>[-~|]*)(?P<kind>U?R)(?P<number>\d+|Z)\|?(?P<pair>\.64)?(?P<half>\.H[01]_H[01])?$")
PREDICATE = re.compile(r"(?P<not>!?)(?P<kind>U?P)(?P<number>\d|T)$")
CONSTANT = re.compile(
    r"(?P<unary>[-~|]*)c\[(?P<bank>0x\w+)\]\[(?:(?P<register>U?R(?:\d+|Z))\+?)?(?P<offset>0x\w+)?\]\|?$"
)


@dataclass(frozen=True, slots=True)
class Value:
    """uint64 [32] of 32-bit (or 64-bit) numbers, and bool [32] whether each is known.

    known_bits: uint64 [32], the bits that are known of numbers that are not, where some are (packed predicates).
    """

    bits: np.ndarray
    known: np.ndarray
    known_bits: np.ndarray | None = None

    @property
    def signed(self) -> np.ndarray:
        """As int64, sign-extended from 32 bits."""
        return self.bits.astype(np.uint32).view(np.int32).astype(np.int64)

    @property
    def floats(self) -> np.ndarray:
        return self.bits.astype(np.uint32).view(np.float32)


ALL = np.ones(LANES, bool)
NONE = np.zeros(LANES, bool)
UNKNOWN = Value(np.zeros(LANES, np.uint64), NONE)


def known(bits: int) -> Value:
    return Value(np.full(LANES, bits & 0xFFFFFFFFFFFFFFFF, np.uint64), ALL)


class Registers:
    """Registers, predicates and constant memory of a warp. Lanes that are not active keep what they have."""

    def __init__(self, constants: bytes):
        self.bits = np.zeros((UNIFORM + 64, LANES), np.uint64)
        self.known = np.zeros((UNIFORM + 64, LANES), bool)
        self.known[[ZERO, UNIFORM_ZERO]] = True
        self.predicate_bits = np.zeros((16, LANES), bool)
        self.predicate_known = np.zeros((16, LANES), bool)
        self.predicate_bits[[TRUE, UNIFORM_TRUE]] = self.predicate_known[[TRUE, UNIFORM_TRUE]] = True
        self.known_bits: dict[int, np.ndarray] = {}
        self.constants = constants

    def read(self, row: int) -> Value:
        return Value(self.bits[row], self.known[row], self.known_bits.get(row))

    def read_pair(self, row: int) -> Value:
        if row in (ZERO, UNIFORM_ZERO):
            return self.read(row)
        high = self.bits[row + 1] << np.uint64(32)
        return Value(self.bits[row] | high, self.known[row] & self.known[row + 1])

    def write(self, row: int, value: Value, active: np.ndarray) -> None:
        if row in (ZERO, UNIFORM_ZERO):
            return
        np.copyto(self.bits[row], value.bits & MASK, where=active)
        np.copyto(self.known[row], value.known, where=active)
        if value.known_bits is not None:
            self.known_bits[row] = value.known_bits
        else:
            self.known_bits.pop(row, None)

    def write_pair(self, row: int, value: Value, active: np.ndarray) -> None:
        self.write(row, value, active)
        self.write(row + 1, Value(value.bits >> np.uint64(32), value.known), active)

    def write_predicate(self, row: int, bits: np.ndarray, is_known: np.ndarray, active: np.ndarray) -> None:
        if row in (TRUE, UNIFORM_TRUE):
            return
        np.copyto(self.predicate_bits[row], bits, where=active)
        np.copyto(self.predicate_known[row], is_known, where=active)

    def constant(self, offset: int, size: int) -> int | None:
        """Bytes of bank 0, which holds launch and parameters, as a number; None past its end."""
        part = self.constants[offset : offset + size]
        return int.from_bytes(part, "little") if len(part) == size else None


Reader = Callable[[Registers], Value]


def row_of(text: str) -> int | None:
    """The row of a register such as R4, URZ or R4.64; None for another operand."""
    found = REGISTER.match(text)
    if found is None:
        return None
    first, zero = (UNIFORM, UNIFORM_ZERO) if found["kind"] == "UR" else (0, ZERO)
    return zero if found["number"] == "Z" else first + int(found["number"])


def predicate_row(text: str) -> int | None:
    """The row of a predicate, negated or not; None for another operand."""
    found = PREDICATE.match(text)
    if found is None:
        return None
    number = 7 if found["number"] == "T" else int(found["number"])
    return number + (8 if found["kind"] == "UP" else 0)


def reader(text: str, size: int = 4, floating: bool = False) -> Reader:
    """What reads an operand: register, constant memory or number, of `size` bytes, with its sign turned or inverted."""
    text = text.removesuffix(".reuse")
    if found := REGISTER.match(text):
        row = row_of(text)
        assert row is not None
        if found["half"]:
            return lambda _: UNKNOWN
        read = (lambda state: state.read_pair(row)) if size == 8 or found["pair"] else (lambda state: state.read(row))
        return _with_unary(found["unary"], read, floating)
    if found := CONSTANT.match(text):
        return _with_unary(found["unary"], _constant_reader(found, size), floating)
    number = immediate(text, floating)
    value = UNKNOWN if number is None else known(number)
    return lambda _: value


def immediate(text: str, floating: bool = False) -> int | None:
    """A number in an operand as 32 bits (negative ones as two's complement); None if it is none."""
    try:
        if not floating or "0x" in text:
            return int(text, 0) & 0xFFFFFFFF
        return struct.unpack("<I", struct.pack("<f", float(text.replace("+INF", "inf").replace("-INF", "-inf"))))[0]
    except (ValueError, OverflowError):
        return None


def _constant_reader(found: re.Match, size: int) -> Reader:
    offset = int(found["offset"] or "0", 16)
    if int(found["bank"], 16) != 0:
        return lambda _: UNKNOWN
    if found["register"] is None:

        def read(state: Registers) -> Value:
            number = state.constant(offset, size)
            return UNKNOWN if number is None else known(number)

        return read
    row = row_of(found["register"])
    assert row is not None

    def read_indexed(state: Registers) -> Value:
        index = state.read(row)
        numbers = [
            state.constant(offset + int(i), size) if is_known else None
            for i, is_known in zip(index.signed, index.known, strict=True)
        ]
        return Value(
            np.array([number or 0 for number in numbers], np.uint64),
            np.array([number is not None for number in numbers]),
        )

    return read_indexed


def _with_unary(unary: str, read: Reader, floating: bool) -> Reader:
    """For integers "-" gives 2^32 - x, without cutting it to 32 bits: sums carry as x's complement plus one does."""
    if not unary:
        return read

    def apply(state: Registers) -> Value:
        value = read(state)
        bits = value.bits
        if floating:
            bits = bits & np.uint64(0x7FFFFFFF) if "|" in unary else bits
            bits = bits ^ np.uint64(0x80000000) if "-" in unary else bits
        elif "~" in unary:
            bits = ~bits & MASK
        elif "-" in unary:
            bits = (~bits & MASK) + np.uint64(1)
        return Value(bits, value.known)

    return apply
