"""Accesses of a warp to memory: addresses, sectors, turns of the banks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.prediction import h200
from bench.prediction.registers import Registers, Value, known, reader, row_of
from bench.prediction.sass import Instruction

GLOBAL = ("LDG", "STG", "LD", "ST", "ATOMG", "ATOM", "RED", "LDGSTS")
SHARED = ("LDS", "STS", "ATOMS")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass
class Access:
    """One access of a warp to global memory: the first byte of each lane that takes part."""

    addresses: np.ndarray
    width: int
    is_write: bool

    def sectors(self) -> np.ndarray:
        """The numbers of the sectors of 32 bytes that are touched, each once."""
        first, last = self.addresses // h200.SECTOR_BYTES, (self.addresses + self.width - 1) // h200.SECTOR_BYTES
        return np.unique(np.concatenate([first, last]))

    def used_bytes(self) -> int:
        """Distinct bytes that the lanes want."""
        return len(np.unique(self.addresses)) * self.width


def shared_turns(addresses: np.ndarray, width: int) -> list[int]:
    """Turns of the 32 banks of 4 bytes that each part of a warp takes; lanes that want one word share it.

    Accesses of 8 and 16 bytes are served in halves and quarters of the warp.
    """
    words = max(1, width // 4)
    turns = []
    for part in np.array_split(addresses, words):
        if len(part):
            wanted = np.unique((part[:, None] // 4 + np.arange(words)).ravel())
            turns.append(int(np.bincount(wanted % 32).max()))
    return turns


def address_reader(one: Instruction) -> Callable[[Registers], Value]:
    """What adds up the parts of an address such as desc[UR6][R10.64+0x4] or [R5+UR4+0x20]."""
    operand = next(text for text in one.operands if text.endswith("]") and not text.startswith("c["))
    parts = operand[operand.rindex("[") + 1 : -1].replace("+-", "+~").split("+")
    is_global = one.base in GLOBAL
    readers = []
    for part in parts:
        if row_of(part.split(".X")[0]) is not None:
            name, _, scale = part.partition(".X")
            read = reader(name, 8 if is_global and (".64" in name or name.startswith("UR")) else 4)
            readers.append(_scaled(read, int(scale)) if scale else read)
        else:
            readers.append(_constant(int(part.replace("~", "-"), 0)))

    def add(state: Registers) -> Value:
        values = [read(state) for read in readers]
        total = np.add.reduce([value.bits for value in values])
        return Value(total, np.logical_and.reduce([value.known for value in values]))

    return add


def _constant(number: int) -> Callable[[Registers], Value]:
    value = known(number)
    return lambda _: value


def _scaled(read: Callable[[Registers], Value], scale: int) -> Callable[[Registers], Value]:
    def scaled(state: Registers) -> Value:
        value = read(state)
        return Value(value.bits * np.uint64(scale), value.known)

    return scaled
