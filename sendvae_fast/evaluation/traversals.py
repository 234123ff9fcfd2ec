"""`sendvae evaluate traversals`: what of a picture changes when its latent is moved along an attribute's direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.attributes import encoded_parts, fit_probes, open_data
from sendvae_fast.evaluation.feature_networks import load_features
from sendvae_fast.evaluation.job import Evaluation, Say
from sendvae_fast.evaluation.origins import crop_size, weights_origin
from sendvae_fast.evaluation.probing.attribute_probe import ProbeScores
from sendvae_fast.evaluation.probing.directions import attribute_directions
from sendvae_fast.evaluation.probing.encoding import feature_folder, posterior_means
from sendvae_fast.evaluation.probing.rows import Rows, share
from sendvae_fast.evaluation.probing.scores import Estimate, estimate_of_means
from sendvae_fast.evaluation.result import Measurement, Result
from sendvae_fast.evaluation.settings import TraversalsConfig
from sendvae_fast.evaluation.traversal_figures import draw_matrices, draw_strips
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder, LatentShape
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.pixels import to_uint8
from sendvae_fast.progress import Progress

STEPS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
"""Of a strip, in deviations of the attribute's logit."""


class Traversal(NamedTuple):
    """Of one autoencoder."""

    effects: Tensor
    """Change of attribute b's judged logit along attribute a's direction, in deviations over the test pictures, for a
    step of one deviation of a's own logit: float32 [n, A, A] (picture, a, b)."""
    strips: list[Tensor]
    """For each picture that is shown, uint8 [A, len(STEPS), 3, S, S]."""


def evaluate_traversals(config: TraversalsConfig, say: Say = print) -> list[Result]:
    """Measure, draw, and add the results to their files. Everything that is given is looked at before the work begins.

    Raises:
        UserError: pictures, attributes or weights are missing or broken.
    """
    weights = [resolve_weights(where) for where in config.autoencoders]
    config.judge.check()
    distributed = init_distributed()
    sizes = {crop_size(config.image_size, path) for path in weights}
    if len(sizes) > 1:
        raise UserError(f"the autoencoders are of {sorted(sizes)} pixels; give --image_size, or those of one size")
    size = sizes.pop()
    data = open_data(config, size)
    num = min(len(data.test.ids), config.num_pictures)
    places = np.linspace(0, len(data.test.ids) - 1, num).astype(np.int64)
    shared = {"train": data.train.pictures.origin, "test": data.test.pictures.origin}
    network = load_features(config.judge, distributed.device)
    results, found = [], {}
    with feature_folder(config.cache, distributed) as folder:
        origin = network.origin

        def judged(images: Tensor) -> Tensor:
            return network(images).pooled

        features = encoded_parts(judged, f"{origin.name} {origin.sha256}", data, config.batch_size, folder, distributed)
        judge = fit_probes(features, data, config.probe, config.seed, distributed)
        spread = judge.model.logits(features[2]).std(dim=0).clamp(min=1e-6)
        for path, where in zip(weights, config.autoencoders, strict=True):
            autoencoder = load_autoencoder(path).autoencoder.to(distributed.device)
            shape = autoencoder.latent_shape(size)
            evaluation = Evaluation(weights={"autoencoder": weights_origin(path, autoencoder)}, pictures=shared)
            identity = evaluation.weights["autoencoder"].sha256
            rows = encoded_parts(posterior_means(autoencoder), identity, data, config.batch_size, folder, distributed)
            probes = fit_probes(rows, data, config.probe, config.seed, distributed)
            directions = attribute_directions(probes.model, rows[0], config.direction)
            chosen = rows[2].take(places)
            own = chosen.take(np.arange(*share(num, distributed)))
            moved = traverse(autoencoder, own, shape, directions, _logits_of(judged, judge), spread, config)
            moved = _joined(distributed.gather_objects(moved), config.num_shown)
            found[_name(where, found)] = moved
            if distributed.is_main:
                out = config.results_file(run_of(path))
                results += evaluation.finish(_measurements(moved, judge, config), out, say)
    if not distributed.is_main:
        return []
    figures = Path(config.folder)
    matrices = {name: one.effects.mean(dim=0).numpy() for name, one in found.items()}
    draw_matrices(figures / "matrices.png", matrices, data.names)
    for number in range(min(config.num_shown, num)):
        strips = {name: one.strips[number] for name, one in found.items()}
        draw_strips(figures / f"strips_{number}.png", strips, data.names, STEPS)
    say(f"drawn: {figures}")
    return results


@torch.no_grad()
def traverse(
    autoencoder: ImageAutoencoder,
    rows: Rows,
    shape: LatentShape,
    directions: Tensor,
    judge: Callable[[Tensor], Tensor],
    spread: Tensor,
    config: TraversalsConfig,
) -> Traversal:
    """Move latents [n, C H W] along each direction [A, C H W], decode, and have the pictures judged.

    Args:
        autoencoder: whose latents these are.
        rows: the latents.
        shape: of one.
        directions: steps of one deviation.
        judge: uint8 pictures [B, 3, S, S] to logits [B, A] on the CPU.
        spread: deviation of the judge's logits [A].
        config: batch size, and how many pictures get strips.
    """
    num_attributes, reach = len(directions), STEPS[-1]
    effects = torch.zeros(len(rows), num_attributes, num_attributes)
    strips = []

    def decode(z: Tensor) -> Tensor:
        parts = z.unflatten(1, shape).split(config.batch_size)
        return torch.cat([to_uint8(autoencoder.decode(part), "round") for part in parts])

    with Progress("traversing", len(rows), unit="picture") as progress:
        for number, z in enumerate(z for _, block in rows.blocks() for z in block):
            ends = torch.cat([z + sign * reach * directions for sign in (-1, 1)])  # [2 A, C H W]
            low, high = judge(decode(ends)).chunk(2)
            effects[number] = (high - low) / spread / (2 * reach)
            if number < config.num_shown:
                steps = torch.tensor(STEPS, device=z.device)[:, None]
                strips.append(torch.stack([decode(z + steps * direction).cpu() for direction in directions]))
            progress.advance()
    return Traversal(effects, strips)


def _joined(parts: Sequence[Traversal], num_shown: int) -> Traversal:
    """The ranks' parts, in the order of pictures, as one."""
    strips = [strip for part in parts for strip in part.strips]
    return Traversal(torch.cat([part.effects for part in parts]), strips[:num_shown])


def selectivity(means: Tensor) -> Tensor:
    """Share of the change that is the attribute's own and of the right sign, mean over attributes.

    Args:
        means: effects [R, A, A].

    Returns:
        [R]: 1 where nothing else changes, 1 / A where all attributes change alike, 0 where the own ones do not.
    """
    own = means.diagonal(dim1=1, dim2=2).clamp(min=0)
    return (own / means.abs().sum(dim=2).clamp(min=1e-12)).mean(dim=1)


def _measurements(moved: Traversal, judge: ProbeScores, config: TraversalsConfig) -> list[Measurement]:
    num, num_attributes = moved.effects.shape[:2]
    matrix = moved.effects.mean(dim=0)

    def record(metric: str, estimate: Estimate, what: str) -> Measurement:
        return Measurement(
            metric=metric,
            value=estimate.value,
            interval=estimate.interval,
            interval_of="test pictures",
            protocol=f"{what}, direction {config.direction}, {STEPS[-1]:g} deviations each way",
            counts={"pictures": num},
            remarks=(f"judged by probes on {config.judge.name} features, whose F1 is {judge.at_half.macro.value:.3f}",),
            details={"names": list(judge.names), "effects": matrix.tolist()},
        )

    def of_means(function: Callable[[Tensor], Tensor]) -> Estimate:
        flat = moved.effects.flatten(1)
        return estimate_of_means(flat, lambda means: function(means.unflatten(1, (num_attributes, -1))))

    own = of_means(lambda means: means.diagonal(dim1=1, dim2=2).mean(dim=1))
    return [
        record("traversal_selectivity", of_means(selectivity), "share of change that is the moved attribute's own"),
        record("traversal_effect", own, "change of the moved attribute's judged logit per deviation"),
    ]


def _logits_of(judged: Callable[[Tensor], Tensor], judge: ProbeScores) -> Callable[[Tensor], Tensor]:
    return lambda images: judge.model.logits(Rows(judged(images), images.device))


def _name(where: str, taken: dict[str, Traversal]) -> str:
    """A short name of an autoencoder that no other has: the last parts of its path."""
    parts = Path(where).parts
    for length in range(1, len(parts) + 1):
        name = "/".join(parts[-length:])
        if name not in taken and (length > 1 or name not in ("vae", "checkpoints")):
            return name
    raise UserError(f"{where} is given twice")
