"""Tensors by where they lie, for the addresses that launches are given and that warps touch."""

import bisect
from collections.abc import Iterable

JOINED = 0
"""Stands for all tensors of a launch together, in the place of an address."""


class Tensors:
    """Memory of tensors, views of one taken as one. sizes: bytes by address."""

    def __init__(self, known: Iterable[tuple[int, int]]):
        self.sizes: dict[int, int] = {}
        begin = end = -1
        for address, size in sorted(known, key=lambda tensor: (tensor[0], -tensor[1])):
            if size <= 0:
                continue
            if address >= end:
                begin, end = address, address + size
            end = max(end, address + size)
            self.sizes[begin] = end - begin
        self._begins = sorted(self.sizes)

    def at(self, address: int) -> int | None:
        """The beginning of the tensor that holds this byte."""
        position = bisect.bisect_right(self._begins, address) - 1
        if position < 0:
            return None
        begin = self._begins[position]
        return begin if address < begin + self.sizes[begin] else None

    def without_addresses(self, arguments: list[str]) -> tuple[list[list[str]], list[int]]:
        """Arguments with numbers of tensors and offsets in the place of pointers, and the addresses in that order.

        arguments: the bytes of each as hexadecimal digits; pointers lie at multiples of 8 bytes.
        """
        found: list[int] = []

        def word(text: str) -> str:
            address = int.from_bytes(bytes.fromhex(text), "little")
            begin = self.at(address) if len(text) == 16 else None
            if begin is None:
                return text
            if begin not in found:
                found.append(begin)
            return f"tensor {found.index(begin)} + {address - begin}"

        return [[word(text[i : i + 16]) for i in range(0, len(text), 16)] for text in arguments], found
