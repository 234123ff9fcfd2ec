"""Where measured networks and pictures come from: the run and step of weights, hashes, the crop size of a run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.latents.shard_format import file_list_sha256
from sendvae_fast.engine.run_weights import run_of, step_of
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import PicturesOrigin, WeightsOrigin
from sendvae_fast.models.weights import weights_sha256
from sendvae_fast.reading import NotOfItsKind, count_in, read_yaml, reading

MAX_CROP = 2**14
"""Pixels of a side; a run's file that names more is damaged."""


def weights_origin(path: Path, network: nn.Module) -> WeightsOrigin:
    """Of a network that was loaded from `path`, which `resolve_weights` gave."""
    return WeightsOrigin(path=str(path), sha256=weights_sha256(network.state_dict()), step=step_of(path))


def catalog_origin(catalog: Catalog, image_size: int) -> PicturesOrigin:
    """Of a catalog's pictures: by their contents where it is indexed, else by their names."""
    sha256, hash_of = file_list_sha256(catalog), "names"
    if catalog.facts is not None and not catalog.facts["sha256"].null_count:
        digest = hashlib.sha256(sha256.encode())
        for content in catalog.facts["sha256"].to_pylist():
            digest.update(content)
        sha256, hash_of = digest.hexdigest(), "contents"
    return PicturesOrigin(
        path=str(catalog.root), num_pictures=len(catalog), image_size=image_size, sha256=sha256, hash_of=hash_of
    )


def crop_size(given: int | None, weights: Path) -> int:
    """Side of the pictures in pixels: the given one, else that which the run of these weights was trained with.

    Raises:
        UserError: none is given, and the weights are in no run of stage 1.
    """
    if given is not None:
        return given
    run = run_of(weights)
    if run is None:
        raise UserError(
            f"{weights} does not say the size of its pictures: give --image_size (256 for published autoencoders)"
        )
    settings = read_yaml(run / "config.yaml", "give --image_size")
    with reading(run / "config.yaml", "give --image_size"):
        size = count_in(settings["data"], "image_size")
        if not 0 < size <= MAX_CROP:
            raise NotOfItsKind(f"data.image_size is {size}")
    return size
