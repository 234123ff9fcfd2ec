"""The settings of `sendvae convert`."""

import re
from dataclasses import dataclass
from typing import Literal

from sendvae_fast import checks
from sendvae_fast.errors import UserError


@dataclass(kw_only=True)
class ConvertConfig:
    """The weights to convert and the layout to write."""

    source: str
    """Folder, run or checkpoint file."""
    to: Literal["diffusers", "ldm", "sendvae", "generator", "repa", "repa-e", "lightningdit"]
    """An autoencoder: diffusers, what AutoencoderKL.from_pretrained reads; ldm, the files REPA-E loads; sendvae, our
    folder. A generator: generator, our folder; repa, repa-e (with the latents' batch norm) or lightningdit, a
    checkpoint that these load. An end-to-end run has both; its repa-e is one checkpoint of all
    networks and their optimizers' states, as train_repae.py resumes from."""
    out: str
    """Folder to write; must not exist."""
    stats: str | None = None
    """File with the latents' statistics, where SOURCE has none or other ones: ours, REPA-E's or LightningDiT's."""
    scaling_factor: float | None = None
    """One factor for all channels instead, as SD-VAE's 0.18215."""
    dit: bool = False
    """SOURCE is a checkpoint of DiT. Its weights look like SiT's and mean something else; with --to=generator."""
    licence: str = "unknown"
    """Licence of the weights, for the model card of --to=diffusers or generator: an identifier of the hub's, as mit."""
    push: str | None = None
    """Repository USER/NAME of the Hugging Face hub to upload OUT to, with --to=diffusers. A new one is private until
    you open it on its page. Needs `hf auth login`; without this option nothing leaves the machine."""

    def __post_init__(self) -> None:
        checks.weight_paths(self, "out")
        if not re.fullmatch(r"[\w.+-]+", self.licence):
            raise UserError(f"licence={self.licence} is no identifier of a licence: give mit, apache-2.0 or the like")
        if self.dit and self.to != "generator":
            raise UserError(f"--dit is for --to=generator: a DiT has no other layout here, not {self.to}")
