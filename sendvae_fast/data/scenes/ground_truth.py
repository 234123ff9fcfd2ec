"""What is where in a scene, and how far away: exact, from the description that the picture is rendered from.

Every thing faces the camera and is of one true size, so that its distance is the inverse of its radius in the picture,
in units in which a thing of distance 1 has a radius as long as the picture's side. The main object (2.7 to 5) is before
its neighbours (15 to 29), as it is painted, and all are before a wall.
"""

import numpy as np

from sendvae_fast.data.scenes import sdf
from sendvae_fast.data.scenes.scene import SHAPES, Scene, neighbours_of, rotate

SEGMENT_NAMES = ("background", "neighbour", *SHAPES)
WALL_DISTANCE = 40.0


def scene_truth(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What the centres of pixels show, shadows and highlights aside.

    Args:
        scene: what is in the picture.
        size: side of the picture in pixels.

    Returns:
        Segments, uint8 [size, size], indices into `SEGMENT_NAMES`, and distances, float32 [size, size].
    """
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(steps, steps, indexing="ij", copy=False)
    segments = np.zeros((size, size), np.uint8)
    distances = np.full((size, size), WALL_DISTANCE, np.float32)
    for neighbour in neighbours_of(scene):
        is_there = neighbour.distance(*neighbour.coordinates(x, y)) < 1
        segments[is_there], distances[is_there] = SEGMENT_NAMES.index("neighbour"), 1 / neighbour.radius
    u, v = ((axis - np.float32(c)) / np.float32(scene.radius) for axis, c in zip((x, y), scene.centre, strict=True))
    is_there = sdf.distance(scene.shape, *rotate(u, v, scene.rotation)) < 0
    segments[is_there], distances[is_there] = SEGMENT_NAMES.index(scene.shape), 1 / scene.radius
    return segments, distances
