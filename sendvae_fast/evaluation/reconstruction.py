"""`sendvae evaluate reconstruction`: what an autoencoder loses of real pictures."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run_weights import resolve_weights, run_of
from sendvae_fast.evaluation.chunks import Chunks, Columns, compute_chunks, folder_name
from sendvae_fast.evaluation.distribution_metrics import Moments, too_few
from sendvae_fast.evaluation.extraction import FeatureSet, finite_columns, statistics_of
from sendvae_fast.evaluation.feature_networks import load_features
from sendvae_fast.evaluation.features import FeatureNetwork
from sendvae_fast.evaluation.frechet import frechet_distance, influence
from sendvae_fast.evaluation.intervals import interval_of_mean
from sendvae_fast.evaluation.job import Evaluation, Say
from sendvae_fast.evaluation.origins import crop_size, weights_origin
from sendvae_fast.evaluation.pictures import Pictures, open_pictures
from sendvae_fast.evaluation.reconstruction_protocols import (
    PROTOCOLS,
    Protocol,
    in_model_range,
    protocol_pictures,
    reconstruct,
)
from sendvae_fast.evaluation.reconstruction_quality import IDENTICAL_PSNR_DB, psnr
from sendvae_fast.evaluation.result import Measurement, Result
from sendvae_fast.evaluation.settings import ReconstructionConfig
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models.autoencoder.image_autoencoder import ImageAutoencoder
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.pixels import to_uint8
from sendvae_fast.progress import Progress
from sendvae_fast.sampling.writer import PngFolder


def evaluate_reconstruction(config: ReconstructionConfig, say: Say = print) -> list[Result]:
    """Measure, and add the results to their file. Collective; rank 0 has the results, the others none.

    Everything that is given is looked at before the work begins.

    Raises:
        UserError: pictures or weights are missing or broken.
    """
    weights, protocol = resolve_weights(config.autoencoder), PROTOCOLS[config.protocol]
    config.features.check()
    if config.perceptual is not None:
        config.perceptual.check()
    data = open_pictures(config.data, crop_size(config.image_size, weights))
    out = config.results_file(run_of(weights))
    ranks = init_distributed()
    autoencoder = load_autoencoder(weights).autoencoder.to(ranks.device)
    autoencoder.latent_shape(data.origin.image_size)  # raises for a size that it does not take
    perceptual = None if config.perceptual is None else Perceptual(config.perceptual).to(ranks.device)
    network = load_features(config.features, ranks.device, protocol.resizing)
    evaluation = Evaluation(
        weights={"autoencoder": weights_origin(weights, autoencoder)}, pictures={"data": data.origin}
    )
    job = ReconstructionJob(
        autoencoder=autoencoder,
        protocol=protocol,
        network=network,
        perceptual=perceptual,
        batch_size=config.batch_size,
        seed=config.seed,
        pictures=None if config.pictures is None else Path(config.pictures),
    )
    folder = None
    if out is not None:
        key = folder_name("reconstruction", evaluation.weights["autoencoder"].sha256[:16], data.identity[:16])
        settings = (config.protocol, data.origin.image_size, config.seed, network.origin.sha256[:8])
        net = None if perceptual is None else perceptual.net
        folder = out.with_name(f"{out.name}.{folder_name(key, *settings, net, config.pictures is not None)}")
    measured = job.measure(data, ranks, folder)
    results = evaluation.finish(measured, out, say) if ranks.is_main else []
    ranks.barrier()
    if ranks.is_main and folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return results


@dataclass(frozen=True, kw_only=True)
class ReconstructionJob:
    """Loaded networks, all on one device, and the rules to measure by."""

    autoencoder: ImageAutoencoder
    protocol: Protocol
    network: FeatureNetwork
    further: FeatureNetwork | None = None
    """Another network, whose features of the reconstructions are computed, too."""
    perceptual: Perceptual | None = None
    batch_size: int = 64
    seed: int = 0
    pictures: Path | None = None
    """Folder to write the pictures to."""

    def measure(
        self,
        data: Pictures,
        distributed: Distributed | None = None,
        folder: Path | None = None,
        chunk: int | None = None,
    ) -> list[Measurement]:
        """`measurements` of what `compute` finds. Collective where `folder` is given; ranks but the first have none."""
        chunks = self.compute(data, distributed, folder, chunk)
        return [] if distributed is not None and not distributed.is_main else self.measurements(chunks)

    def compute(
        self,
        data: Pictures,
        distributed: Distributed | None = None,
        folder: Path | None = None,
        chunk: int | None = None,
    ) -> Chunks:
        """Reconstruct pictures, and compute of each what is measured. Collective where `folder` is given.

        Args:
            data: pictures; a catalog's are cropped by the protocol.
            distributed: the ranks that share the work.
            folder: for what is computed, as in `compute_chunks`.
            chunk: pictures per file, as there.

        Returns:
            Columns, among them the features of the reconstructions: see `features_of_reconstructions`.
        """
        data = protocol_pictures(data, self.protocol)
        with Progress("reconstructing", len(data), unit="picture") as progress:
            return compute_chunks(
                len(data), lambda start, stop: self._compute(data, start, stop, progress), distributed, folder, chunk
            )

    def measurements(self, chunks: Chunks) -> list[Measurement]:
        """Fréchet distance, PSNR, SSIM and, with `perceptual`, LPIPS, of what `compute` found."""
        counts = {"pictures": len(chunks["psnr"])}
        return [self._distance(chunks, counts), *self._qualities(chunks, counts)]

    def features_of_reconstructions(self, chunks: Chunks) -> FeatureSet:
        """The pooled features of the reconstructions in what `compute` found, by `further` where there is one."""
        return FeatureSet(chunks, "reconstructed" if self.further is None else "reconstructed_further")

    @torch.no_grad()
    def _compute(self, data: Pictures, start: int, stop: int, progress: Progress) -> Columns:
        device, parts, first = next(self.autoencoder.parameters()).device, [], start
        for images in data.batches(self.batch_size, start, stop):
            ids = torch.arange(first, first + len(images), device=device)
            x = in_model_range(images.to(device, non_blocking=True))
            parts.append(self._columns(x, ids))
            first += len(images)
            progress.advance(len(images))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        finite = {name: columns[name] for name in columns if name != "psnr"}  # identical pictures have an infinite one
        finite_columns(finite, data, start, stop, self.network)
        return columns

    def _columns(self, x: Tensor, ids: Tensor) -> Columns:
        """What is measured of each picture x [B, 3, S, S] in [-1, 1]."""
        decoded = reconstruct(self.autoencoder, x, ids, self.protocol, self.seed)
        original, rounded = to_uint8(x, "round"), to_uint8(decoded, "round")
        if self.pictures is not None:
            for name, images in (("originals", original), ("reconstructions", rounded)):
                PngFolder(self.pictures / name).write(ids.tolist(), images)
        columns = {
            "psnr": psnr(original, rounded),
            "ssim": self.protocol.similarity(x, decoded),
            "original": self.network(original).pooled,
            "reconstructed": self.network(rounded).pooled,
        }
        if self.further is not None:
            columns["reconstructed_further"] = self.further(rounded).pooled
        if self.perceptual is not None:
            columns["lpips"] = self.perceptual(x, decoded.float()).flatten()
        return {name: column.cpu() for name, column in columns.items()}

    def _distance(self, chunks: Chunks, counts: dict[str, int]) -> Measurement:
        dim = self.network.origin.dim
        original, reconstructed = (
            Moments.of(statistics_of(part[name] for part in chunks)) for name in ("original", "reconstructed")
        )
        sides = (original.mean, original.covariance), (reconstructed.mean, reconstructed.covariance)
        value, interval = frechet_distance(*sides[0], *sides[1]), None
        if counts["pictures"] > dim:  # both sides change with the pictures, together
            moved = influence(chunks["original"], *sides[0], *sides[1])
            moved += influence(chunks["reconstructed"], *sides[1], *sides[0])
            interval = interval_of_mean(value, moved, least=0.0)
        return Measurement(
            metric=self.network.metric("rfrechet"),
            value=value,
            protocol=f"{self.protocol.name}, {self.network.protocol}",
            interval=interval,
            interval_of="the pictures drawn, without the bias of their number" if interval else "",
            features=self.network.origin,
            counts=counts,
            remarks=(*self.network.remarks, *too_few(counts, dim)),
        )

    def _qualities(self, chunks: Chunks, counts: dict[str, int]) -> list[Measurement]:
        """Means over pictures."""
        decibels = chunks["psnr"]
        values = {"psnr": decibels.clamp(max=IDENTICAL_PSNR_DB), "ssim": chunks["ssim"]}
        if self.perceptual is not None:
            values[f"lpips_{self.perceptual.net}"] = chunks["lpips"]
        identical = int(decibels.isinf().sum())
        found = []
        for name, column in values.items():
            value = float(column.double().mean())
            measurement = Measurement(
                metric=name,
                value=value,
                protocol=self.protocol.name,
                interval=interval_of_mean(value, column) if len(column) > 1 else None,
                interval_of="the pictures drawn" if len(column) > 1 else "",
                counts=counts,
            )
            if name == "psnr" and identical:
                remark = f"{identical:,} identical pictures count as {IDENTICAL_PSNR_DB:g} dB"
                measurement = replace(measurement, remarks=(remark,))
            found.append(measurement)
        return found
