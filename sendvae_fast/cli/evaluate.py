"""Measure an autoencoder (reconstructions, linear attribute probes) and generated pictures (distance from real ones).

    sendvae evaluate --data=scenes/test --autoencoder=runs/send --train_data=scenes/train --image_size=64
    sendvae evaluate --data=imagenet/val --samples=samples/xl --foundation.name=dinov2-vit-b --foundation.weights=...

Without the weights of a published network the distances compare runs of this project with each other only.
"""

from sendvae_fast.evaluation.evaluate import EvaluateConfig, evaluate

Config = EvaluateConfig
MAIN_OPTIONS = (
    "autoencoder",
    "train_data",
    "samples",
    "reference",
    "image_size",
    "foundation.name",
    "foundation.weights",
    "perceptual.weights",
    "out",
)


def run(config: EvaluateConfig) -> None:
    """Measure and print."""
    evaluate(config)
