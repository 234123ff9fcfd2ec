"""Segmentation and depth of latents without training on them: a run's alignment network and a foundation model's heads.

    sendvae downstream --autoencoder=runs/reals --train_data=scenes/train --data=scenes/test --generator=runs/sit
    sendvae downstream --autoencoder=runs/reals --train_data=pets/train --data=pets/test --trimaps=pets/trimaps

Linear heads are fitted to the foundation model's features of pictures, then given what the alignment network makes of
latents. Beside them: the same heads on true features, heads fitted to raw latents. Strips of pictures go to `folder`,
results to `evaluation.jsonl` in the autoencoder's run.
"""

from sendvae_fast.downstream.settings import DownstreamConfig

Config = DownstreamConfig
MAIN_OPTIONS = ("autoencoder", "train_data", "data", "trimaps", "generator", "num_train", "num_test", "folder", "out")


def run(config: DownstreamConfig) -> None:
    """Fit, measure, print and draw."""
    from sendvae_fast.downstream.downstream import downstream

    downstream(config)
