"""Measure what an autoencoder loses of held-out pictures: PSNR, SSIM, LPIPS, Fréchet distance.

    sendvae evaluate reconstruction --autoencoder=runs/send --data=imagenet/val --perceptual.weights=vgg16.pth

Results are added to `evaluation.jsonl` in the autoencoder's run; `sendvae report` shows them.
"""

from sendvae_fast.evaluation.reconstruction import ReconstructionConfig, evaluate_reconstruction

Config = ReconstructionConfig


def run(config: ReconstructionConfig) -> None:
    """Measure and print."""
    evaluate_reconstruction(config)
