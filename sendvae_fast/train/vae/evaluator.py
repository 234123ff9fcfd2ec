"""Stage 1 reconstructs pictures every so many steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.evaluation.chunks import folder_name
from sendvae_fast.evaluation.feature_networks import load_features
from sendvae_fast.evaluation.job import Evaluation
from sendvae_fast.evaluation.reconstruction import ReconstructionJob
from sendvae_fast.evaluation.reconstruction_protocols import PROTOCOLS
from sendvae_fast.evaluation.result import Measurement, WeightsOrigin
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.weights import weights_sha256
from sendvae_fast.train.evaluator import Evaluator, spread_over
from sendvae_fast.train.vae.settings import VAETrainConfig

PROTOCOL = PROTOCOLS["lightningdit"]
"""By which the tokenizer papers' tables are made."""


class AutoencoderStage(Protocol):
    """What is asked of stage 1 (`train.vae.stage.VAEStage`)."""

    def trained_autoencoder(self) -> Autoencoder:
        """A copy of the autoencoder as it is now, on the CPU of every rank. Collective."""
        ...


class ReconstructionEvaluator(Evaluator):
    """rFID, PSNR, SSIM and, where training has LPIPS weights, LPIPS, of the weights as they are.

    Raises:
        UserError: pictures or weights are missing or broken.
    """

    def __init__(self, config: VAETrainConfig, training: Catalog, every: int, distributed: Distributed) -> None:
        super().__init__(Path(config.run), every, config.loop.num_steps, distributed)
        settings, perceptual = config.evaluation, config.loss.perceptual
        self._are_held_out = settings.data is not None
        catalog = training if settings.data is None else Catalog.open(settings.data)
        self._pictures = spread_over(catalog, settings.num_pictures, config.data.image_size)
        self._network = load_features(settings.features, distributed.device, PROTOCOL.resizing)
        self._perceptual = None if perceptual is None else Perceptual(perceptual).to(distributed.device)
        self._batch_size, self._run = settings.batch_size, config.run

    def measure(self, stage: AutoencoderStage, step: int) -> tuple[Evaluation, list[Measurement]]:
        """As in `Evaluator`."""
        evaluation = Evaluation(pictures={"data": self._pictures.origin})
        autoencoder = stage.trained_autoencoder().to(self.ranks.device)
        sha256 = weights_sha256(autoencoder.state_dict())
        evaluation.weights["autoencoder"] = WeightsOrigin(path=self._run, sha256=sha256, step=step)
        job = ReconstructionJob(
            autoencoder=autoencoder,
            protocol=PROTOCOL,
            network=self._network,
            perceptual=self._perceptual,
            batch_size=self._batch_size,
        )
        folder = self.folder / "samples" / folder_name(sha256[:16], self._pictures.identity[:16])
        measured = job.measure(self._pictures, self.ranks, folder, self.chunk)
        return evaluation, measured if self._are_held_out else [_of_training(item) for item in measured]


def _of_training(measurement: Measurement) -> Measurement:
    remark = "these pictures are among those that it is trained on"
    return replace(measurement, remarks=(*measurement.remarks, remark))
