"""Stage 2 draws pictures every so many steps."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.distribution_metrics import Reference, distribution_metrics
from sendvae_fast.evaluation.drawn import DrawnPictures
from sendvae_fast.evaluation.extraction import FeatureSet, extract
from sendvae_fast.evaluation.feature_networks import load_features
from sendvae_fast.evaluation.generation import moments_origin, open_reference
from sendvae_fast.evaluation.job import Evaluation
from sendvae_fast.evaluation.origins import weights_origin
from sendvae_fast.evaluation.pictures import npz_keys
from sendvae_fast.evaluation.result import Measurement, WeightsOrigin
from sendvae_fast.evaluation.settings import MetricName
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.weights import weights_sha256
from sendvae_fast.sampling.generate import LatentDecoder, check_fit
from sendvae_fast.train.evaluator import Evaluator, spread_over
from sendvae_fast.train.sit.settings import SiTTrainConfig

METRICS: tuple[MetricName, ...] = ("frechet", "inception_score", "precision_recall", "mind")
"""What a few thousand pictures are enough for, and costs little beside drawing them."""


class GeneratorStage(Protocol):
    """What is asked of stage 2 (`train.sit.stage.SiTStage`)."""

    model: SiT
    latent_mean: Tensor
    latent_std: Tensor

    def averaged_weights(self) -> dict[str, Tensor]:
        """The weights to draw with, on the CPU of every rank. Collective."""
        ...


class GenerationEvaluator(Evaluator):
    """The metrics of `METRICS`, of pictures drawn from the averaged weights.

    Args:
        config: of the run.
        latent_shape: [C, H, W] of its latents.
        every: steps between evaluations.
        distributed: the ranks.

    Raises:
        UserError: pictures or weights are missing or broken.
    """

    def __init__(
        self, config: SiTTrainConfig, latent_shape: tuple[int, int, int], every: int, distributed: Distributed
    ) -> None:
        super().__init__(Path(config.run), every, config.loop.num_steps, distributed)
        settings = self._settings = config.evaluation
        if config.autoencoder is None:
            raise UserError("loop.evaluate_every draws pictures: give --autoencoder, the one that made the latents")
        if config.generator.is_diffusion != settings.generate.sampler.is_diffusion:
            kinds = "ddpm or ddim" if config.generator.is_diffusion else "sde, euler, heun or dopri5"
            raise UserError(f"evaluation.generate.sampler.kind does not draw from this generator: give {kinds}")
        settings.generate.check_channels(latent_shape[0])
        path = resolve_weights(config.autoencoder)
        self._autoencoder = load_autoencoder(path).autoencoder.to(distributed.device)
        self._weights = {"autoencoder": weights_origin(path, self._autoencoder)}
        where = settings.reference or config.data.root
        if where is None:
            raise UserError("evaluation.reference is missing: give real pictures, or their moments, to compare with")
        image_size = self._autoencoder.image_size(latent_shape)
        self._moments = None
        if npz_keys(where) is None:
            self._pictures = spread_over(Catalog.open(where), settings.num_reference, image_size)
        else:
            self._pictures, self._moments = open_reference(where, image_size, settings.features.name)
        self._origin = moments_origin(where) if self._pictures is None else self._pictures.origin
        self._network = load_features(settings.features, distributed.device)
        self._reference: FeatureSet | None = None
        self._run = config.run

    def measure(self, stage: GeneratorStage, step: int) -> tuple[Evaluation, list[Measurement]]:
        """As in `Evaluator`."""
        evaluation = Evaluation(pictures={"reference": self._origin})
        sit = SiT(stage.model.config)
        sit.load_state_dict(stage.averaged_weights())
        generator = WeightsOrigin(path=self._run, sha256=weights_sha256(sit.state_dict()), step=step)
        decoder = LatentDecoder(self._autoencoder, stage.latent_mean, stage.latent_std)
        check_fit(sit.config, self._autoencoder, self._settings.generate)
        weights = {"generator": generator, **self._weights}
        drawn = DrawnPictures(sit.to(self.ranks.device).eval(), decoder, self._settings.generate, True, weights)
        evaluation.weights, evaluation.pictures["samples"] = weights, drawn.origin
        batch_size = self._settings.generate.batch_size
        if self._reference is None and self._pictures is not None:
            folder = self.folder / "reference"
            self._reference = extract(self._pictures, self._network, batch_size, self.ranks, folder, chunk=self.chunk)
        folder = self.folder / "samples"
        samples = extract(drawn, self._network, batch_size, self.ranks, folder, chunk=self.chunk)
        if not self.ranks.is_main:
            return evaluation, []
        reference = Reference(self._reference, *(self._moments or (None, None)))
        return evaluation, distribution_metrics(samples, reference, self._network, self.ranks.device, METRICS)
