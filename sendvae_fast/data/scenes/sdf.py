"""Signed distance fields of the shapes in the synthetic scenes.

Coordinates are in units of the shape's radius, centred on it; distances are negative inside. The star's and the
flower's are bounds (right in sign, close in value near the outline), which is all that rendering needs.
"""

import numpy as np


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance float32 to the outline of `shape` at the points (u, v), arrays of one shape."""
    return _SHAPES[shape](u, v)


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - np.float32(0.95)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - np.float32(0.68)) - np.float32(0.32)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    rounding, half_side = np.float32(0.14), np.float32(0.8)
    du, dv = np.abs(u) - (half_side - rounding), np.abs(v) - (half_side - rounding)
    outside = np.hypot(np.maximum(du, 0), np.maximum(dv, 0))
    return outside + np.minimum(np.maximum(du, dv), 0) - rounding


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Equilateral with rounded corners: the largest of three half-planes, its level sets rounded near a corner."""
    inradius, rounding = np.float32(0.58), np.float32(0.1)
    planes = [
        u * np.float32(np.cos(a)) + v * np.float32(np.sin(a)) - (inradius - rounding)
        for a in (np.pi / 2, np.pi / 2 + 2 * np.pi / 3, np.pi / 2 + 4 * np.pi / 3)
    ]
    outside = np.sqrt(sum(np.maximum(plane, 0) ** 2 for plane in planes))
    inside = np.minimum(np.maximum(np.maximum(planes[0], planes[1]), planes[2]), 0)
    return outside + inside - rounding


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: the angle is folded into one half-point, whose edge is a straight line."""
    outer, inner, half = 1.08, 0.48, np.pi / 5
    tip, notch = np.array([outer, 0.0]), inner * np.array([np.cos(half), np.sin(half)])
    edge = notch - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    angle = np.arctan2(v, u)
    folded = np.abs((angle + np.float32(half)) % np.float32(2 * half) - np.float32(half))
    radius = np.hypot(u, v)
    side_u, side_v = radius * np.cos(folded), radius * np.sin(folded)
    return (side_u - np.float32(tip[0])) * np.float32(normal[0]) + (side_v - np.float32(tip[1])) * np.float32(normal[1])


def _flower(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    petals = np.float32(0.78) + np.float32(0.2) * np.cos(np.float32(5) * np.arctan2(v, u))
    return np.float32(0.8) * (np.hypot(u, v) - petals)


_SHAPES = {"disc": _disc, "ring": _ring, "square": _square, "triangle": _triangle, "star": _star, "flower": _flower}
