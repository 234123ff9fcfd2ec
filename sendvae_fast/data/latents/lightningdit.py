"""Latents that LightningDiT's `extract_features` wrote: sampled latents and those of the mirrored pictures.

    latents_rank00_shard000.safetensors ...   latents, latents_flip [n, C, H, W]; labels int64 [n]
    latents_stats.pt                          mean, std [1, C, 1, 1], of the latents

The order of the samples does not tell which pictures they are of, so REPA cannot be used with them.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sendvae_fast.data.latents.latent_rows import LatentRows
from sendvae_fast.errors import UserError

SHARD_PATTERN = re.compile(r"latents_rank\d+_shard\d+\.safetensors")
STATISTICS_FILE = "latents_stats.pt"


@dataclass(frozen=True)
class PublishedLatents:
    """A folder of published latents: a sample has one field, in a plain and a flipped variant."""

    directory: Path
    rows: LatentRows
    labels: Tensor
    """int64 [N]."""
    latent_mean: Tensor
    """float32 [C]."""
    latent_std: Tensor
    """float32 [C]."""

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def is_here(directory: Path) -> bool:
        """Whether the folder holds such shards."""
        return any(SHARD_PATTERN.fullmatch(path.name) for path in directory.glob("latents_rank*"))

    @classmethod
    def open(cls, directory: str | Path) -> "PublishedLatents":
        """Open a folder of shards.

        Raises:
            UserError: a shard or the statistics are missing, damaged or of another shape.
        """
        directory = Path(directory)
        paths = sorted(path for path in directory.glob("latents_rank*") if SHARD_PATTERN.fullmatch(path.name))
        rows = LatentRows.of_files(paths, [("latents",), ("latents_flip",)])
        labels = []
        for path, shard in zip(paths, rows.shards, strict=True):
            with safe_open(path, framework="pt") as file:
                keys = file.keys()  # the file has no `in`
                if "labels" not in keys or file.get_slice("labels").get_shape() != [shard.count]:
                    raise UserError(f"the latent shard {path} has no label for each of its {shard.count} latents")
                labels.append(file.get_tensor("labels").to(torch.int64))
        mean, std = _statistics(directory / STATISTICS_FILE, rows.shape[0])
        return cls(directory, rows, torch.cat(labels), mean, std)


def _statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    if not path.exists():
        raise UserError(f"{path} is missing: it holds the mean and std that the latents are normalised by; add it")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (found[name].float().reshape(channels) for name in ("mean", "std"))
    except Exception as error:  # torch raises many types for a file that is not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} does not hold mean and std of {channels} channels ({reason}); replace it") from None
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(f"{path} holds a mean or std that is not finite, or a std of 0; replace it")
    return mean, std
