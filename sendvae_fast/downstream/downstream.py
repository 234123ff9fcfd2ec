"""`sendvae downstream`: segmentation and depth of latents, by heads fitted to a foundation model's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sendvae_fast.downstream.alignment_network import AlignmentNetwork, load_alignment_network, patches
from sendvae_fast.downstream.dense_data import DensePictures, open_dense
from sendvae_fast.downstream.generated import DrawnLatents, draw_latents
from sendvae_fast.downstream.heads import (
    LinearHead,
    SegmentationScore,
    abs_rel,
    fit_depth,
    fit_segmentation,
    segmentation_score,
)
from sendvae_fast.downstream.settings import DownstreamConfig
from sendvae_fast.downstream.strips import Maps, save_strips
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.job import Evaluation, Say
from sendvae_fast.evaluation.origins import crop_size, weights_origin
from sendvae_fast.evaluation.probing.encoding import posterior_means
from sendvae_fast.evaluation.probing.scores import Estimate
from sendvae_fast.evaluation.result import Measurement, Result
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.progress import Progress

PROTOCOL = "linear heads on directions of patch tokens"


class Tokens(NamedTuple):
    """Of the same pictures."""

    true: Tensor
    """The foundation model's, [n, N, D]."""
    mapped: Tensor
    """The alignment network's of their latents, [n, N, D]."""
    latent: Tensor
    """The normalised latents themselves, as patches [n, N, C P P]."""


class Heads(NamedTuple):
    """Fitted to tokens of one kind."""

    segmentation: LinearHead
    depth: LinearHead | None
    """None where distances are not known."""

    def maps(self, tokens: Tensor, size: int) -> Maps:
        """Segments and distances [n, size, size] of tokens."""
        distances = None if self.depth is None else self.depth.distances(tokens, size)
        return self.segmentation.segments(tokens, size), distances


def downstream(config: DownstreamConfig, say: Say = print) -> list[Result]:
    """Fit heads, score them, draw strips, and add the results to their file. Everything given is looked at first.

    Raises:
        UserError: pictures, weights or the alignment network are missing, broken, or do not belong together.
    """
    weights = resolve_weights(config.autoencoder)
    distributed = init_distributed()
    if distributed.world_size > 1:
        raise UserError("downstream works on one rank: start it without torchrun, deepspeed or srun")
    device, size = distributed.device, crop_size(config.image_size, weights)
    autoencoder = load_autoencoder(weights).autoencoder
    network = load_alignment_network(weights, autoencoder, size, config.foundation_weights)
    train, test = (
        open_dense(where, config.trimaps, size, num)
        for where, num in ((config.train_data, config.num_train), (config.data, config.num_test))
    )
    drawn = None
    if config.generator is not None:
        drawn = draw_latents(config.generator, weights, autoencoder, config.generate, device)
    roles = {"autoencoder": weights_origin(weights, autoencoder)} | ({} if drawn is None else drawn.weights)
    origins = {"train": train.pictures.origin, "test": test.pictures.origin}
    evaluation = Evaluation(weights=roles, pictures=origins)
    autoencoder, network = autoencoder.to(device), network.to(device)
    encode = posterior_means(autoencoder)
    train_tokens, test_tokens = (_tokens(data, network, encode, config.batch_size, device) for data in (train, test))
    on_features, on_latents = _fit(train_tokens.true, train), _fit(train_tokens.latent, train)
    found = {
        "foundation": on_features.maps(test_tokens.true, size),
        "mapped": on_features.maps(test_tokens.mapped, size),
        "latents": on_latents.maps(test_tokens.latent, size),
    }
    counts = {"fitted": len(train.segments), "held out": len(test.segments)}
    names, measurements = test.segment_names, []
    for kind, (segments, distances) in found.items():
        score = segmentation_score(segments, test.segments.to(device), len(names))
        measurements.append(_miou(f"segmentation_miou_{kind}", score, names, counts, PROTOCOL))
        if distances is not None and test.distances is not None:
            error = abs_rel(distances, test.distances.to(device))
            measurements.append(_record(f"depth_abs_rel_{kind}", error, counts, PROTOCOL))
    folder = Path(config.folder)
    shown = torch.linspace(0, len(test.segments) - 1, min(config.num_shown, len(test.segments))).long()
    pictures = torch.cat([next(iter(test.pictures.batches(1, place, place + 1))) for place in shown.tolist()])
    rows = [_taken(maps, shown) for maps in ((test.segments, test.distances), *found.values())]
    save_strips(folder / "held_out.png", pictures, rows, len(names))
    if drawn is not None:
        from_latents, from_pictures, pictures = _of_generated(drawn, network, on_features, config.batch_size, size)
        measurements += _agreement(from_latents, from_pictures, names)
        save_strips(folder / "generated.png", pictures[: config.num_shown], [from_latents, from_pictures], len(names))
    results = evaluation.finish(measurements, config.results_file(run_of(weights)), say)
    say(f"drawn: {folder}")
    return results


@torch.no_grad()
def _tokens(
    data: DensePictures,
    network: AlignmentNetwork,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    device: torch.device,
) -> Tokens:
    parts = []
    with Progress("encoding", len(data.segments), unit="picture") as progress:
        for images in data.pictures.batches(batch_size):
            images = images.to(device)
            z = encode(images)
            raw = patches(network.normalised(z), network.patch_size)
            parts.append((network.foundation(images), network.features(z), raw))
            progress.advance(len(images))
    return Tokens(*map(torch.cat, zip(*parts, strict=True)))


def _taken(maps: Maps, places: Tensor) -> Maps:
    """The maps of some pictures, on the CPU."""
    segments, distances = maps
    return segments.cpu()[places], None if distances is None else distances.cpu()[places]


def _fit(tokens: Tensor, data: DensePictures) -> Heads:
    segments = data.segments.to(tokens.device)
    depth = None if data.distances is None else fit_depth(tokens, data.distances.to(tokens.device))
    return Heads(fit_segmentation(tokens, segments, len(data.segment_names)), depth)


@torch.no_grad()
def _of_generated(
    drawn: DrawnLatents, network: AlignmentNetwork, heads: Heads, batch_size: int, size: int
) -> tuple[Maps, Maps, Tensor]:
    """(maps of latents, maps of the decoded pictures by the foundation model, those pictures)."""
    from_latents, from_pictures, pictures = [], [], []
    for z in drawn.z.split(batch_size):
        from_latents.append(network.features(z))
        pictures.append(drawn.decode(z))
        from_pictures.append(network.foundation(pictures[-1]))
    return (
        heads.maps(torch.cat(from_latents), size),
        heads.maps(torch.cat(from_pictures), size),
        torch.cat(pictures),
    )


def _agreement(from_latents: Maps, from_pictures: Maps, names: tuple[str, ...]) -> list[Measurement]:
    counts = {"generated": len(from_latents[0])}
    protocol = f"{PROTOCOL}; of latents, against the same of the decoded pictures"
    score = segmentation_score(from_latents[0], from_pictures[0], len(names))
    found = [_miou("segmentation_miou_generated", score, names, counts, protocol)]
    if from_latents[1] is not None and from_pictures[1] is not None:
        error = abs_rel(from_latents[1], from_pictures[1])
        found.append(_record("depth_abs_rel_generated", error, counts, protocol))
    return found


def _miou(
    metric: str, score: SegmentationScore, names: tuple[str, ...], counts: Mapping[str, int], protocol: str
) -> Measurement:
    each = {name: None if iou != iou else iou for name, iou in zip(names, score.each, strict=True)}
    return _record(metric, score.miou, counts, protocol, {"iou": each})


def _record(
    metric: str, estimate: Estimate, counts: Mapping[str, int], protocol: str, details: Mapping[str, Any] | None = None
) -> Measurement:
    return Measurement(
        metric=metric,
        value=estimate.value,
        interval=estimate.interval,
        interval_of="pictures",
        protocol=protocol,
        counts=counts,
        details=details or {},
    )
