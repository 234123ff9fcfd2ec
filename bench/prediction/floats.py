"""Floating-point instructions, as far as integer division goes through them."""

import numpy as np

from bench.prediction.effects import Effect, forget_results, sign_extended, simple_effect
from bench.prediction.registers import MASK
from bench.prediction.sass import Instruction


def _float_result(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32).astype(np.uint64)


def _floats(bits: np.ndarray) -> np.ndarray:
    return (bits & MASK).astype(np.uint32).view(np.float32)


def fadd(one: Instruction) -> Effect:
    return simple_effect(one, lambda a, b: _float_result(_floats(a) + _floats(b)), floating=True)


def fmul(one: Instruction) -> Effect:
    return simple_effect(one, lambda a, b: _float_result(_floats(a) * _floats(b)), floating=True)


def ffma(one: Instruction) -> Effect:
    def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return _float_result(_floats(a).astype(np.float64) * _floats(b) + _floats(c))

    return simple_effect(one, fused, floating=True)


def mufu(one: Instruction) -> Effect:
    if one.opcode != "MUFU.RCP":
        return forget_results(one)
    return simple_effect(one, lambda a: _float_result(1 / _floats(a)), floating=True)


def to_float(one: Instruction) -> Effect:
    words = one.opcode.split(".")
    if any(word in words for word in ("F64", "F16", "U8", "U16", "S8", "S16")):
        return forget_results(one)
    wide, signed = "U64" in words or "S64" in words, "U32" not in words and "U64" not in words

    def convert(a: np.ndarray) -> np.ndarray:
        exact = a if wide else sign_extended(a).view(np.int64) if signed else a & MASK
        rounded = exact.astype(np.float32)
        if "RP" in words:  # up
            rounded = np.where(rounded.astype(np.float64) < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
        return _float_result(rounded)

    return simple_effect(one, convert, (8,) if wide else ())


def to_integer(one: Instruction) -> Effect:
    words = one.opcode.split(".")
    if "F64" in words or "TRUNC" not in words:
        return forget_results(one)
    wide = "U64" in words or "S64" in words

    def convert(a: np.ndarray) -> np.ndarray:
        top = 2.0**64 - 2048 if wide else 2.0**32 - 1
        return np.clip(np.nan_to_num(_floats(a).astype(np.float64)), 0, top).astype(np.uint64)

    return simple_effect(one, convert, pair=wide, floating=True)
