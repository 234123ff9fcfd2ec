"""Metrics in words: label, meaning, and which way is better, by the names that results carry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A row of a table of metrics."""

    label: str
    meaning: str
    better: Literal["higher", "lower"] | None
    """None where neither is."""
    digits: int


EXACT = {
    "fid": Metric("FID", "generated pictures from real ones", "lower", 2),
    "sfid": Metric("sFID", "generated pictures from real ones, spatial features", "lower", 2),
    "rfid": Metric("rFID", "reconstructions from originals", "lower", 2),
    "psnr": Metric("PSNR, dB", "pixel error of reconstructions", "higher", 2),
    "ssim": Metric("SSIM", "local structure of reconstructions", "higher", 3),
    "attribute_f1": Metric("Attribute F1", "attributes that a linear probe reads off the latents", "higher", 3),
    "attribute_f1_micro": Metric("Attribute F1, micro", "the same, of all decisions", "higher", 3),
    "attribute_f1_tuned": Metric("Attribute F1, tuned", "the same, at the best thresholds", "higher", 3),
    "attribute_f1_tuned_micro": Metric("Attribute F1, tuned, micro", "both", "higher", 3),
    "attribute_recall_top5": Metric("Attribute recall, top 5", "attributes among five guesses", "higher", 3),
    "attribute_f1_control": Metric("Attribute F1 of random numbers", "what a probe gives that knows nothing", None, 3),
    "class_probe_accuracy": Metric("Class probe", "classes that a linear probe reads off the latents", "higher", 3),
    "class_silhouette": Metric("Class silhouette", "how much nearer latents are to their own class", None, 3),
    "uniformity_cv": Metric("Uniformity, variation", "of the density of latents", "lower", 3),
    "uniformity_gini": Metric("Uniformity, Gini", "of the density of latents", "lower", 3),
    "uniformity_entropy": Metric("Uniformity, entropy", "of the density of latents", "higher", 4),
    "latent_high_frequency": Metric("High frequencies", "share of the latents' power", None, 3),
    "decoder_sensitivity": Metric("Decoder sensitivity", "change of pictures by noise in latents", "lower", 3),
    "traversal_selectivity": Metric("Traversal selectivity", "change that is the moved attribute's", "higher", 3),
    "traversal_effect": Metric("Traversal effect", "on the attribute that is moved", "higher", 3),
    "small_sit_velocity_loss": Metric("Velocity loss", "of a small SiT after a few steps", "lower", 3),
}
FAMILIES = {
    "inception_score": Metric("Inception score", "generated pictures alone", "higher", 2),
    "spatial_frechet": Metric("Fréchet distance, spatial", "generated pictures from real ones", "lower", 2),
    "mind": Metric("MIND", "generated pictures from real ones, by sorted projections", "lower", 2),
    "fid_infinity": Metric("FID∞", "FID, extrapolated to any number of pictures", "lower", 2),
    "frechet_infinity": Metric("Fréchet distance∞", "extrapolated to any number of pictures", "lower", 2),
    "rfrechet": Metric("Reconstruction Fréchet distance", "reconstructions from originals", "lower", 2),
    "decoded_frechet": Metric(
        "Fréchet distance from decoded", "generated pictures from decoded real ones, a perfect generator's", "lower", 2
    ),
    "frechet": Metric("Fréchet distance", "generated pictures from real ones", "lower", 2),
    "kid": Metric("KID", "generated pictures from real ones, by a kernel", "lower", 4),
    "precision": Metric("Precision", "generated pictures that are among real ones", "higher", 3),
    "recall": Metric("Recall", "real pictures that are among generated ones", "higher", 3),
    "gmm_nll": Metric("Discrimination", "negative log-likelihood of a mixture of Gaussians", "lower", 2),
    "patch_similarity": Metric("Patch similarity", "of latents, how far in the foundation model's order", None, 3),
    "segmentation_miou": Metric("Segmentation mIoU", "of linear heads on patch tokens", "higher", 3),
    "depth_abs_rel": Metric("Depth abs-rel", "relative error of linear heads on patch tokens", "lower", 3),
    "lpips": Metric("LPIPS", "perceptual distance of reconstructions", "lower", 3),
}
"""By the beginning of a name, whose rest is the network's: ``frechet_dinov2_l``, ``lpips_vgg``."""


def order_of(name: str) -> tuple[int, str]:
    """Where a metric stands among others: as in the lists of names, then by its own."""
    words = [*EXACT, *FAMILIES]
    found = [index for index, word in enumerate(words) if name == word or name.startswith(f"{word}_")]
    return (found[-1] if found else len(words), name)


def family_of(name: str) -> str:
    """What a metric is whatever network it is of: ``frechet`` for ``frechet_dinov2_l``; its name where it has none."""
    return next((family for family in FAMILIES if name == family or name.startswith(f"{family}_")), name)


def metric_of(name: str) -> Metric:
    """The words for a metric; its bare name where there are none."""
    if name in EXACT:
        return EXACT[name]
    family = family_of(name)
    if family not in FAMILIES:
        return Metric(name, "", None, 4)
    metric, network = FAMILIES[family], name.removeprefix(family).replace("_", " ").strip()
    return replace(metric, label=f"{metric.label}, {network}") if network else metric
