"""Measure an autoencoder's latent space without a generator: what is said to tell how well one will learn it.

    sendvae evaluate latents --autoencoder=runs/send --train_data=imagenet/train --data=imagenet/val

Class probe, uniformity, discrimination (Fig. 2 of the paper), power spectrum, sensitivity of the decoder to noise,
velocity loss of a small SiT. To be seen in `sendvae report`, too: classes in the plane (t-SNE), and which patches of
a picture are alike, beside a foundation model's (`--foundation.name=...`). Results are added to `evaluation.jsonl` in
the autoencoder's run.
"""

from sendvae_fast.evaluation.settings import LatentsConfig

Config = LatentsConfig
MAIN_OPTIONS = ("measures", "image_size", "num_decoded", "foundation.name", "cache", "out")


def run(config: LatentsConfig) -> None:
    """Measure and print."""
    from sendvae_fast.evaluation.latents import evaluate_latents

    evaluate_latents(config)
