"""Measure what an autoencoder loses of held-out pictures: rFID, PSNR, SSIM, LPIPS, by a named protocol.

    sendvae evaluate reconstruction --autoencoder=runs/send --data=imagenet/val --features.weights=inception.pth

Results are added to `evaluation.jsonl` in the autoencoder's run; `sendvae report` shows them.
"""

from sendvae_fast.evaluation.settings import ReconstructionConfig

Config = ReconstructionConfig
MAIN_OPTIONS = (
    "protocol",
    "image_size",
    "features.name",
    "features.weights",
    "perceptual.net",
    "perceptual.weights",
    "pictures",
    "batch_size",
    "out",
)


def run(config: ReconstructionConfig) -> None:
    """Measure and print."""
    from sendvae_fast.evaluation.reconstruction import evaluate_reconstruction

    evaluate_reconstruction(config)
