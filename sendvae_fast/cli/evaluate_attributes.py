"""Measure how well linear probes read attributes off an autoencoder's latents.

    sendvae evaluate attributes --autoencoder=runs/send --train_data=scenes/train --data=scenes/test

Both folders need an attributes.csv. Results are added to `evaluation.jsonl` in the autoencoder's run.
"""

from sendvae_fast.evaluation.attributes import AttributesConfig, evaluate_attributes

Config = AttributesConfig


def run(config: AttributesConfig) -> None:
    """Measure and print."""
    evaluate_attributes(config)
