"""Measure how well linear probes read attributes off an autoencoder's latents.

    sendvae evaluate attributes --autoencoder=runs/send --benchmark=celeba --data=celeba
    sendvae evaluate attributes --autoencoder=runs/send --train_data=scenes/train --data=scenes/test

Benchmarks: celeba, deepfashion, awa2, with their official splits; or any two folders with an attributes.csv. Under
torchrun every rank takes its share. Results are added to `evaluation.jsonl` in the autoencoder's run.
"""

from sendvae_fast.evaluation.settings import AttributesConfig

Config = AttributesConfig
MAIN_OPTIONS = ("benchmark", "train_data", "split", "image_size", "control", "cache", "out")


def run(config: AttributesConfig) -> None:
    """Measure and print."""
    from sendvae_fast.evaluation.attributes import evaluate_attributes

    evaluate_attributes(config)
