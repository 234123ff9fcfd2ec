"""Every published file that a packaged config or an evaluation asks for, and where it comes from.

What is not known for sure is None, and shown as "unknown": sizes and hashes stand here only where they are published
(in a file's name, by the project that defines a metric with it), licences only where the weights' own page has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from sendvae_fast.config import packaged_configs, read_config
from sendvae_fast.engine.run_weights import PACKAGED
from sendvae_fast.evaluation.inception_file import FILE, SHA256
from sendvae_fast.models.foundation.recipes import RECIPES

FOLDER = "pretrained"
"""Where the packaged configs look."""
KEYS = ("init_from", "discriminator_from", "generator_from", "start_from", "weights", "heads", "latent_stats")
"""Last parts of the settings that name a file or folder of weights."""
CODE_IS_MIT = "unknown (the code's is MIT)"


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file or folder as configs name it, and what it is made of."""

    path: str
    """As in the configs."""
    what: str
    hub: str | None = None
    """Repository on the Hugging Face hub."""
    files: tuple[str, ...] = ()
    """In that repository; empty for all."""
    url: str | None = None
    """Of the file itself, where it is not on the hub."""
    conversion: str | None = None
    """Options of `sendvae convert` that make `path` of the first file: "--to=sendvae"; None: it is taken as it is."""
    bytes: int | None = None
    """Size of what is published."""
    sha256: str | None = None
    """Of the file at `path`, or as many of its first digits as are published."""
    licence: str = "unknown"
    """Of the weights, as their own page has it."""
    remark: str = ""

    @property
    def published(self) -> str:
        """Where."""
        return self.url or (f"hf.co/{self.hub}" if self.hub else "nowhere that is known")

    @property
    def download(self) -> str:
        """Where what is fetched is put, before it is converted or renamed."""
        name = PurePosixPath(self.path).name.split(".")[0]
        return f"downloads/{name}"


_VARIANTS = "hustvl/va-vae-imagenet256-experimental-variants"
_BY_ITS_RULE = "the file's name follows from REPA-E's rule for its names: look into the repository if it is another"
_NO_STATISTICS = "no latent statistics are known to lie beside it: give `convert` --stats or --scaling_factor"
_FIXED = (
    PublishedFile(
        path="pretrained/vavae-f16d32",
        what="VA-VAE f16d32, the autoencoder that Send-VAE starts from",
        hub="hustvl/vavae-imagenet256-f16d32-dinov2",
        files=("vavae-imagenet256-f16d32-dinov2.pt", "latents_stats.pt"),
        conversion="--stats={folder}/latents_stats.pt --to=sendvae",
        licence=CODE_IS_MIT,
    ),
    PublishedFile(
        path="pretrained/sdvae-f8d4",
        what="SD-VAE f8d4",
        hub="stabilityai/sd-vae-ft-mse",
        files=("config.json", "diffusion_pytorch_model.safetensors"),
        conversion="--scaling_factor=0.18215 --to=sendvae",
        licence="MIT",
    ),
    PublishedFile(
        path="pretrained/invae-f16d32",
        what="IN-VAE f16d32",
        hub="REPA-E/invae",
        files=("invae-f16d32.pt", "invae-f16d32-latents-stats.pt"),
        conversion="--to=sendvae",
        licence=CODE_IS_MIT,
        remark=_BY_ITS_RULE,
    ),
    *(
        PublishedFile(
            path=f"pretrained/{name}-{sizes}-discriminator.pt",
            what=f"the discriminator of {words}, published by REPA-E",
            hub=f"REPA-E/{name}",
            files=(f"{name}-{sizes}-discriminator-ckpt.pt",),
            licence=CODE_IS_MIT,
            remark="" if name == "sdvae" else _BY_ITS_RULE,
        )
        for name, sizes, words in (
            ("vavae", "f16d32", "VA-VAE"),
            ("invae", "f16d32", "IN-VAE"),
            ("sdvae", "f8d4", "SD-VAE"),
        )
    ),
    *(
        PublishedFile(
            path=f"pretrained/vae-{sizes}{part}",
            what=f"{words} {sizes} of latent-diffusion's recipe, 50 epochs",
            hub=_VARIANTS,
            files=(f"ldm-imagenet256-{sizes}-50ep.ckpt",),
            conversion=conversion,
            licence=CODE_IS_MIT,
            remark=remark,
        )
        for sizes in ("f16d16", "f16d64")
        for part, words, conversion, remark in (
            ("", "the autoencoder", "--to=sendvae", _NO_STATISTICS),
            ("-discriminator.pt", "the training checkpoint, which has the discriminator, of the", None, ""),
        )
    ),
    PublishedFile(
        path="pretrained/vgg16-397923af.pth",
        what="torchvision's VGG16, for LPIPS in training",
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af",
        licence="unknown (torchvision's code: BSD-3-Clause)",
    ),
    PublishedFile(
        path=f"pretrained/{FILE}",
        what="Inception of 2015, for FID and its like",
        url=f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}",
        sha256=SHA256,
        licence="unknown (torch-fidelity's code: Apache-2.0)",
    ),
    PublishedFile(
        path="pretrained/VIRTUAL_imagenet256_labeled.npz",
        what="ADM's reference of ImageNet at 256, for FID and its like",
        url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
        "VIRTUAL_imagenet256_labeled.npz",
        licence="unknown (ImageNet's terms)",
    ),
)
EVALUATION = (f"pretrained/{FILE}", "pretrained/VIRTUAL_imagenet256_labeled.npz")
"""What `sendvae evaluate` needs and no config names."""


@cache
def catalog() -> dict[str, PublishedFile]:
    """All of them, by path: those of `_FIXED`, and the foundation models' as timm publishes them."""
    import timm  # here, because a list of what is published is asked for by few, and timm takes seconds

    found = {file.path: file for file in _FIXED}
    for name, recipe in RECIPES.items():
        published = timm.get_pretrained_cfg(f"{recipe.timm_name}.{recipe.tag}")
        if published is None:
            continue
        url = str(published.url or "")
        by_url = not published.hf_hub_id
        file = PublishedFile(
            path=f"{FOLDER}/{url.rpartition('/')[2] if by_url else f'{name}.safetensors'}",
            what=f"foundation model {name}",
            hub=None if by_url else str(published.hf_hub_id),
            files=() if by_url else ("model.safetensors",),
            url=url if by_url else None,
            licence=published.license or "unknown",
        )
        found[file.path] = file
    return found


@cache
def needed_by() -> dict[str, tuple[str, ...]]:
    """The packaged configs that name each path, or "evaluate"."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(EVALUATION, ("evaluate",))
    for name, path in packaged_configs().items():
        for weights in dict.fromkeys(weights_in(read_config(path)).values()):
            found[weights] = (*found.get(weights, ()), name)
    return found


def weights_in(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The files and folders of weights that settings name, by dotted key; not those that come with the package."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= weights_in(value, f"{prefix}{key}.")
        elif key in KEYS and isinstance(value, str) and value not in ("null", *PACKAGED):
            found[prefix + key] = value
    return found
