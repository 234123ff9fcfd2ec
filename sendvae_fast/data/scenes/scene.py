"""Synthetic scenes: one textured, shaded object on a varied background, with every attribute known.

A scene is a pure function of (seed, scene id). Its class is the pair (shape, texture) of the main object; its binary
attributes say what the object is, where it stands, how it is lit and what is around it. Colours, polarity (object
lighter or darker than what is behind it), position, scale and rotation vary freely, so that a linear function of the
pixels says little about the attributes.

Shapes are signed distance fields evaluated on a pixel grid of twice the final size and averaged down; colours are
drawn in OKLCH, where equal lightness looks equally light whatever the hue.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from sendvae_fast.data.scenes import sdf

SHAPES = ("disc", "ring", "square", "triangle", "star", "flower")
TEXTURES = ("plain", "striped", "dotted", "checked")
CLASS_NAMES = tuple(f"{shape}_{texture}" for shape in SHAPES for texture in TEXTURES)
ATTRIBUTES = (
    "curved",
    "pointed",
    "lobed",
    "striped",
    "dotted",
    "matching",
    "large",
    "left",
    "upper",
    "contrasting",
    "outlined",
    "glossy",
    "shadowed",
    "lit_from_left",
    "busy_background",
    "crowded",
)
SUPERSAMPLING = 2
MAX_NEIGHBOURS = 6


@dataclass(kw_only=True, frozen=True)
class Scene:
    """What is in one picture. Lengths are fractions of its side, angles are radians, colours are (L, C, h) in OKLCH."""

    scene_id: int
    label: int
    """Index into `CLASS_NAMES`."""
    attributes: dict[str, bool]
    """One entry per name in `ATTRIBUTES`."""
    centre: tuple[float, float]
    radius: float
    rotation: float
    light_angle: float
    """Direction to the light in the picture plane; 0 is to the right, pi / 2 is down."""
    colour: tuple[float, float, float]
    colour_2: tuple[float, float, float]
    """Second colour of the texture."""
    background: tuple[float, float, float]
    background_2: tuple[float, float, float]
    details_seed: int
    """Seeds what carries no attribute: background waves, neighbours, grain."""

    @property
    def shape(self) -> str:
        return SHAPES[self.label // len(TEXTURES)]

    @property
    def texture(self) -> str:
        return TEXTURES[self.label % len(TEXTURES)]


class Neighbour(NamedTuple):
    """A small disc or lozenge beside the main object, in the units of `Scene`."""

    centre: tuple[float, float]
    radius: float
    is_disc: bool
    colour: tuple[float, float, float]

    def coordinates(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points of the picture in units of the radius, from the centre."""
        centre_x, centre_y, radius = (np.float32(value) for value in (*self.centre, self.radius))
        return (x - centre_x) / radius, (y - centre_y) / radius

    def distance(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """0 at the centre, 1 at the outline."""
        return np.hypot(u, v) if self.is_disc else np.abs(u) + np.abs(v)


def draw_scene(seed: int, scene_id: int) -> Scene:
    """Draw scene `scene_id` of the family `seed`. Classes take turns, so that they are balanced for any number."""
    rng = np.random.default_rng((seed, scene_id))
    label = scene_id % len(CLASS_NAMES)
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    attributes = {name: bool(rng.random() < 0.5) for name in ATTRIBUTES}
    attributes |= {
        "curved": shape in ("disc", "ring", "flower"),
        "pointed": shape in ("triangle", "star"),
        "lobed": shape in ("star", "flower"),
        "striped": texture == "striped",
        "dotted": texture == "dotted",
    }
    radius = rng.uniform(0.3, 0.37) if attributes["large"] else rng.uniform(0.2, 0.25)
    offset_x, offset_y = rng.uniform(0.06, 0.26, 2)
    centre = (
        _inside(0.5 - offset_x if attributes["left"] else 0.5 + offset_x, radius),
        _inside(0.5 - offset_y if attributes["upper"] else 0.5 + offset_y, radius),
    )
    # Colours are relative (to the background's hue, to its lightness), never at a level of their own, which any linear
    # function of the pixels could read.
    background_hue = rng.uniform(0, 2 * np.pi)
    hue = background_hue + (rng.uniform(-0.45, 0.45) if attributes["matching"] else np.pi + rng.uniform(-0.6, 0.6))
    contrast = rng.uniform(0.34, 0.44) if attributes["contrasting"] else rng.uniform(0.16, 0.22)
    levels = rng.uniform(0.3, 0.88 - contrast) + np.array([0.0, contrast])
    lightness, background_lightness = rng.permutation(levels)
    light_angle = rng.uniform(-0.85, 0.85) + (np.pi if attributes["lit_from_left"] else 0.0)
    return Scene(
        scene_id=scene_id,
        label=label,
        attributes=attributes,
        centre=centre,
        radius=radius,
        rotation=rng.uniform(0, 2 * np.pi),
        light_angle=light_angle,
        colour=(lightness, rng.uniform(0.1, 0.2), hue),
        colour_2=(
            lightness + rng.choice((-1, 1)) * rng.uniform(0.2, 0.3),
            rng.uniform(0.04, 0.16),
            hue + rng.uniform(-0.7, 0.7),
        ),
        background=(background_lightness, rng.uniform(0.02, 0.13), background_hue),
        background_2=(
            background_lightness + rng.uniform(-0.1, 0.1),
            rng.uniform(0.02, 0.13),
            background_hue + rng.uniform(-1.4, 1.4),
        ),
        details_seed=int(rng.integers(2**32)),
    )


def render_scene(scene: Scene, size: int) -> np.ndarray:
    """Render `scene` as a uint8 RGB picture [size, size, 3]."""
    rng = np.random.default_rng(scene.details_seed)
    num = size * SUPERSAMPLING
    steps = (np.arange(num, dtype=np.float32) + 0.5) / num
    y, x = np.meshgrid(steps, steps, indexing="ij", copy=False)
    image = _background(scene, x, y, rng)  # [num, num, 3]
    _add_neighbours(image, scene, x, y, rng)
    _add_object(image, scene, x, y)
    vignette = 1.0 - rng.uniform(0.05, 0.3) * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    image *= vignette[..., None]
    image = image.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean(axis=(1, 3))
    white_balance = rng.uniform(0.93, 1.07, 3).astype(np.float32)
    grain = rng.standard_normal((size, size, 1), dtype=np.float32) * np.float32(rng.uniform(0.0, 0.01))
    return (np.clip(image * white_balance + grain, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def oklch_to_srgb(lightness: float, chroma: float, hue: float) -> np.ndarray:
    """Convert one OKLCH colour to sRGB in [0, 1], float32 [3] (B. Ottosson, "A perceptual color space", 2020)."""
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    roots = np.array(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_linear @ roots**3, 0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return encoded.astype(np.float32)


def _inside(position: float, radius: float) -> float:
    """Move a centre so that at most a fifth of the radius sticks out of the picture."""
    return min(max(position, 0.8 * radius), 1.0 - 0.8 * radius)


def _smoothstep(low: float, high: float, value: np.ndarray) -> np.ndarray:
    ramp = np.clip((value - low) / (high - low), 0.0, 1.0)
    return ramp * ramp * (3.0 - 2.0 * ramp)


def _blend(image: np.ndarray, colour: np.ndarray, weight: np.ndarray) -> None:
    """Lay `colour` ([3] or [h, w, 3]) over `image` in place, `weight` [h, w] of it."""
    image += (colour - image) * weight[..., None]


def _background(scene: Scene, x: np.ndarray, y: np.ndarray, rng: Generator) -> np.ndarray:
    """A soft gradient between two colours, bent by a slow wave; busy ones carry hills, bokeh or ripples as well."""
    first, second = oklch_to_srgb(*scene.background), oklch_to_srgb(*scene.background_2)
    angle = rng.uniform(0, 2 * np.pi)
    along = (x - 0.5) * np.float32(np.cos(angle)) + (y - 0.5) * np.float32(np.sin(angle))
    across = (y - 0.5) * np.float32(np.cos(angle)) - (x - 0.5) * np.float32(np.sin(angle))
    bent = along + np.float32(0.12) * np.sin(across * np.float32(rng.uniform(3, 7)) + np.float32(rng.uniform(0, 6)))
    image = first + (second - first) * _smoothstep(-0.6, 0.6, bent)[..., None]
    if scene.attributes["busy_background"]:
        kind = rng.integers(3)
        (_add_hills, _add_bokeh, _add_ripples)[kind](image, scene, x, y, rng)
    return image


def _add_hills(image: np.ndarray, scene: Scene, x: np.ndarray, y: np.ndarray, rng: Generator) -> None:
    lightness, chroma, hue = scene.background
    for layer in range(3):
        crest = 0.3 + 0.22 * layer + 0.06 * np.sin(x[0] * rng.uniform(4, 10) + rng.uniform(0, 6.3))  # [w]
        crest = (crest + 0.02 * np.sin(x[0] * rng.uniform(15, 30))).astype(np.float32)
        shade = oklch_to_srgb(lightness - 0.05 * (layer + 1), chroma + 0.02 * layer, hue + 0.25 * layer)
        _blend(image, shade, _smoothstep(-0.012, 0.012, y - crest))


def _add_bokeh(image: np.ndarray, scene: Scene, x: np.ndarray, y: np.ndarray, rng: Generator) -> None:
    lightness, chroma, hue = scene.background
    for _ in range(9):
        centre_x, centre_y, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.07, 0.16)
        rows, columns = _window(image.shape[0], centre_x, centre_y, radius * 1.2)
        distance = np.hypot(x[rows, columns] - np.float32(centre_x), y[rows, columns] - np.float32(centre_y))
        shade = oklch_to_srgb(lightness + rng.uniform(-0.1, 0.16), chroma + 0.04, hue + rng.uniform(-1, 1))
        _blend(image[rows, columns], shade, 0.55 * (1 - _smoothstep(0.85 * radius, 1.1 * radius, distance)))


def _add_ripples(image: np.ndarray, scene: Scene, x: np.ndarray, y: np.ndarray, rng: Generator) -> None:
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.2)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    wobble = np.float32(rng.uniform(0.0, 0.04)) * np.sin((x - y) * np.float32(9))
    waves = 0.5 + 0.5 * np.sin((along + wobble) * np.float32(2 * np.pi / period))
    lightness, chroma, hue = scene.background
    shade = oklch_to_srgb(lightness + rng.choice((-1, 1)) * 0.12, chroma, hue + rng.uniform(-0.5, 0.5))
    _blend(image, shade, 0.8 * waves)


def neighbours_of(scene: Scene) -> list[Neighbour]:
    """The neighbours that `render_scene` draws, in its order, at any size of the picture."""
    rng = np.random.default_rng(scene.details_seed)
    y, x = np.meshgrid(*[np.array([0.25, 0.75], np.float32)] * 2, indexing="ij")
    _background(scene, x, y, rng)  # draws its numbers before the neighbours do
    return list(_draw_neighbours(scene, rng))


def _draw_neighbours(scene: Scene, rng: Generator) -> Iterator[Neighbour]:
    """Small untextured discs and lozenges around the main object: three to six when crowded, at most one otherwise."""
    wanted = rng.integers(3, MAX_NEIGHBOURS + 1) if scene.attributes["crowded"] else rng.integers(2)
    placed = 0
    for _ in range(8 * MAX_NEIGHBOURS):
        if placed == wanted:
            return
        centre_x, centre_y, radius = rng.uniform(0.06, 0.94), rng.uniform(0.06, 0.94), rng.uniform(0.035, 0.065)
        if np.hypot(centre_x - scene.centre[0], centre_y - scene.centre[1]) < scene.radius + 0.7 * radius:
            continue
        placed += 1
        is_disc = rng.random() < 0.5
        lightness = scene.background[0] + rng.choice((-1, 1)) * rng.uniform(0.15, 0.3)
        colour = (lightness, rng.uniform(0.06, 0.16), rng.uniform(0, 2 * np.pi))
        yield Neighbour((centre_x, centre_y), radius, is_disc, colour)


def _add_neighbours(image: np.ndarray, scene: Scene, x: np.ndarray, y: np.ndarray, rng: Generator) -> None:
    for neighbour in _draw_neighbours(scene, rng):
        rows, columns = _window(image.shape[0], *neighbour.centre, neighbour.radius * 1.3)
        u, v = neighbour.coordinates(x[rows, columns], y[rows, columns])
        toward_light = u * np.float32(np.cos(scene.light_angle)) + v * np.float32(np.sin(scene.light_angle))
        lit = np.clip(oklch_to_srgb(*neighbour.colour) * (1.0 + 0.25 * toward_light[..., None]), 0.0, 1.0)
        _blend(image[rows, columns], lit, 1 - _smoothstep(0.9, 1.1, neighbour.distance(u, v)))


def _add_object(image: np.ndarray, scene: Scene, x: np.ndarray, y: np.ndarray) -> None:
    """The main object: shadow, outline, texture, rounded shading and, when glossy, a highlight."""
    num, radius = image.shape[0], scene.radius
    rows, columns = _window(num, *scene.centre, radius * 1.8)
    u = (x[rows, columns] - np.float32(scene.centre[0])) / np.float32(radius)  # unit: the object's radius
    v = (y[rows, columns] - np.float32(scene.centre[1])) / np.float32(radius)
    canvas = image[rows, columns]
    light_x, light_y = np.float32(np.cos(scene.light_angle)), np.float32(np.sin(scene.light_angle))
    pixel = 1.0 / (num * radius)

    if scene.attributes["shadowed"]:
        shifted = sdf.distance(scene.shape, *rotate(u + 0.3 * light_x, v + 0.3 * light_y - 0.12, scene.rotation))
        canvas *= (1.0 - 0.5 * (1 - _smoothstep(-0.28, 0.3, shifted)))[..., None]

    object_u, object_v = rotate(u, v, scene.rotation)
    distance = sdf.distance(scene.shape, object_u, object_v)
    weight = 0.5 + 0.5 * np.tanh(1.3 * _texture_wave(scene.texture, object_u, object_v))
    first, second = oklch_to_srgb(*scene.colour), oklch_to_srgb(*scene.colour_2)
    surface = first + (second - first) * weight[..., None]

    # A rounded rim: the surface tilts outward along the gradient of the distance as the rim comes near.
    slope_v, slope_u = np.gradient(distance)
    norm = np.hypot(slope_u, slope_v) + 1e-6
    tilt = np.clip(1.0 + distance / 0.55, 0.0, 1.0) ** 2
    facing = (slope_u * light_x + slope_v * light_y) / norm * tilt
    surface *= (1.0 + 0.38 * facing)[..., None]
    if scene.attributes["glossy"]:
        spot = np.exp(-(((facing - 0.42) / 0.16) ** 2)) + 0.5 * np.exp(
            -((u - 0.34 * light_x) ** 2 + (v - 0.34 * light_y) ** 2) / 0.03
        )
        _blend(surface, np.ones(3, np.float32), np.clip(0.75 * spot, 0.0, 1.0))
    if scene.attributes["outlined"]:
        rim = oklch_to_srgb(0.25 if scene.colour[0] > 0.55 else 0.93, 0.04, scene.colour[2])
        _blend(surface, rim, _smoothstep(-0.16, -0.12, distance))
    _blend(canvas, np.clip(surface, 0.0, 1.0), 1 - _smoothstep(-pixel, pixel, distance))


def _texture_wave(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A signed wave whose sign picks the texture's first or second colour; periods are in object radii."""
    if texture == "plain":
        return np.full_like(u, -3.0)
    if texture == "striped":
        return 3.0 * np.sin(v * np.float32(2 * np.pi / 0.52))
    if texture == "checked":
        return 5.0 * np.sin(u * np.float32(np.pi / 0.36)) * np.sin(v * np.float32(np.pi / 0.36))
    # Dots: peaks of three plane waves 60 degrees apart, which form a hexagonal lattice.
    wave = sum(
        (
            np.cos((u * np.float32(np.cos(a)) + v * np.float32(np.sin(a))) * np.float32(11.0))
            for a in (0.0, np.pi / 3, 2 * np.pi / 3)
        ),
        start=np.zeros_like(u),
    )
    return 2.5 * (wave - 0.6)


def rotate(u: np.ndarray, v: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """The points (u, v) as seen from axes turned by `angle`, in radians."""
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return u * cosine + v * sine, v * cosine - u * sine


def _window(num: int, centre_x: float, centre_y: float, reach: float) -> tuple[slice, slice]:
    """Rows and columns of the pixels within `reach` of a centre: everything else need not be touched."""
    low = (max(int((c - reach) * num), 0) for c in (centre_y, centre_x))
    high = (min(int((c + reach) * num) + 2, num) for c in (centre_y, centre_x))
    rows, columns = (slice(a, max(b, a + 2)) for a, b in zip(low, high, strict=True))
    return rows, columns
