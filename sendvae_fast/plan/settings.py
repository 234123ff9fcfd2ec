"""What a plan assumes beside the run's settings."""

from __future__ import annotations

from dataclasses import dataclass

from sendvae_fast import checks
from sendvae_fast.errors import UserError
from sendvae_fast.plan.gpus import GPU, find_gpu

IMAGENET_PICTURES = 1_281_167
"""ImageNet-1k's training pictures."""
IMAGENET_BYTES = 147_897_477_120
"""Of its ILSVRC2012_img_train.tar."""


@dataclass(kw_only=True)
class PlanConfig:
    """The machines and the assumptions of a plan. Raises `UserError` for a value out of range."""

    gpus: int = 8
    """GPUs, over all nodes."""
    gpu: str = "H100"
    """Their kind: B200, H200, H100, H100 PCIe, H100 NVL, A100, A100 40GB, L40S or A10."""
    gpus_per_node: int = 8
    """GPUs that NVLink or one host joins."""
    mfu: float = 0.35
    """Share of the GPU's bf16 peak that a step's arithmetic reaches. An assumption: none was measured. Published ones
    of such networks are 0.2 (LightningDiT-XL/1, from its hours on H800) to 0.5 (NeMo's DiT of 7 billion)."""
    link_share: float = 0.75
    """Share of the makers' bandwidths (links, network, memory) that is reached. An assumption."""
    price: float | None = None
    """Price of an hour of one GPU, in whatever currency; null: no cost is printed."""
    num_images: int | None = None
    """Training pictures; null: as many as `data.root` has where it is there, else ImageNet-1k's 1,281,167."""
    num_classes: int = 1000
    """Classes of the generator."""
    latent: tuple[int, int, int] | None = None
    """For `train sit`: channels, height and width of the latents; null: those of `latents` where it is there, else 32
    at 1/16 of the picture for patches of 1, 4 at 1/8 for larger ones."""
    sweep: bool = False
    """A table of 1 to 1,024 GPUs in place of one plan."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "gpus", "gpus_per_node", "num_images", "num_classes")
        checks.in_interval("(0, 1]", self, "mfu", "link_share")
        checks.at_least(0, self, "price")
        find_gpu(self.gpu)
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(
                f"gpus={self.gpus} does not fill nodes of gpus_per_node={self.gpus_per_node}: change either"
            )
        if self.latent is not None and min(self.latent) < 1:
            raise UserError(f"latent is {list(self.latent)}: give channels, height and width, as [32,16,16]")

    @property
    def kind(self) -> GPU:
        """The kind of GPU."""
        return find_gpu(self.gpu)
