"""Measure an autoencoder (reconstructions, linear attribute probes) and generated pictures (distance from real ones).

sendvae evaluate --data=scenes/test --autoencoder=runs/send --train_data=scenes/train --image_size=64
sendvae evaluate --data=imagenet/val --samples=samples/xl --foundation.name=dinov2-vit-b --foundation.weights=...
"""

from sendvae_fast.evaluation.evaluate import EvaluateConfig, evaluate

Config = EvaluateConfig


def run(config: EvaluateConfig) -> None:
    """Measure and print."""
    evaluate(config)
