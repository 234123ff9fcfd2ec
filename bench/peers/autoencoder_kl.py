"""The training step of diffusers' `AutoencoderKL`, from the installed package.

Its training script (examples/research_projects/autoencoderkl/train_autoencoderkl.py in the repository of diffusers) is
no part of the package: the network is the package's, and the step is done here in the script's order. The script takes
LPIPS under `torch.no_grad()`, so that it is in the loss and trains nothing. One row shows that as what users run; ours,
in which LPIPS trains, is never equal mathematics to it. The other row leaves LPIPS out on both sides, and is equal.
Both are without the discriminator, whose loss has no weight in the script before step 50,001: that spares the peer its
forward pass.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.case import Column, PeerCase, columns_of
from bench.peers.first_step import FirstStep, gradients_of
from bench.peers.ours import OurStep, draws_of
from bench.peers.theirs import Runner, versions_of
from bench.step_cases import StepCase, random_vgg
from sendvae_fast.errors import UserError
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.losses.settings import PerceptualConfig
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.diffusers_layout import from_diffusers, from_diffusers_config
from sendvae_fast.models.pixels import to_model_range

NAME, OPTION = "diffusers", "--diffusers"
KL_WEIGHT, PERCEPTUAL_WEIGHT, MAX_GRAD_NORM = 1e-6, 0.5, 1.0  # the script's defaults
EQUAL, AS_RUN = "without LPIPS", "as its script runs"
REMARK = "not equal mathematics: its script takes LPIPS under no_grad, so that LPIPS trains nothing; in ours it does"


def open_checkout(_: Path) -> None:
    """There is none: the package is what is installed. UserError where it is not."""
    _package("diffusers")
    _package("accelerate")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise UserError(
            f"{OPTION} needs the package {missing}, which is not installed: pip install {missing}"
        ) from error


def packages() -> dict[str, str]:
    """Versions of the packages that its speed depends on."""
    return versions_of("accelerate", "diffusers")


def cases(device: torch.device) -> list[PeerCase]:
    """SD-VAE's network (f8d4): on a GPU at 256 px, on a CPU of half its width at 64 px."""
    width, pixels, batch = (128, 256, 16) if device.type == "cuda" else (64, 64, 2)
    block = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = dict(
        block_out_channels=[width, 2 * width, 4 * width, 4 * width], layers_per_block=2, latent_channels=4, **block
    )
    name = f"f8d4{'' if width == 128 else ' of half width'}, {pixels} px"
    return [
        _case(name, EQUAL, sizes, width, pixels, batch),
        _case(name, AS_RUN, sizes, width, pixels, batch),
    ]


def _case(name: str, kind: str, sizes: dict[str, Any], width: int, pixels: int, batch: int) -> PeerCase:
    loss: dict[str, Any] = {"reconstruction": "l2", "reduction": "sum", "kl_weight": KL_WEIGHT, "gan_weight": 0.0}
    if kind == EQUAL:
        loss["perceptual"] = None
    else:
        loss["perceptual_weight"] = PERCEPTUAL_WEIGHT
    settings = {
        "data": {"image_size": pixels}, "alignment": {"method": "none"}, "loss": loss,
        "autoencoder": {
            "base_channels": width, "channel_multipliers": [1, 2, 4, 4], "attention_resolutions": [],
            "latent_channels": 4,
        },
    }  # fmt: skip
    own = StepCase("vae", name, "vae/send_vae_f16d32.yaml", settings, batch, (4, pixels // 8, pixels // 8))
    equal = kind == EQUAL
    return PeerCase(kind, f"AutoencoderKL {name}, {kind}", sizes, own, equal=equal, remark="" if equal else REMARK)


def columns(case: PeerCase, device: torch.device) -> list[Column]:
    """The script trains in float32 unless told otherwise, and compiles nothing."""
    return columns_of("fp32", False, device)


def theirs(case: PeerCase, column: Column, device: torch.device, checkout: None, scratch: Path) -> "_Step":
    """The peer's step."""
    return _Step(case, column, device, scratch)


def ours(case: PeerCase, column: Column, device: torch.device, checkout: None, scratch: Path) -> OurStep:
    """Our step with the peer's weights."""
    state = from_diffusers(_network(case).state_dict(), _our_sizes(case))
    weights = {"vae": {f"autoencoder.{name}": value for name, value in state.items()}}
    return OurStep(case.ours, column, weights, None, device, scratch)


def _network(case: PeerCase) -> Any:
    torch.manual_seed(0)
    return _package("diffusers").AutoencoderKL(**case.sizes)


def _our_sizes(case: PeerCase) -> AutoencoderConfig:
    return from_diffusers_config(case.sizes)


class _Step:
    """The script's step.

    Args:
        case: what is built.
        column: how it is run.
        device: where it runs.
        scratch: a folder for files.
    """

    def __init__(self, case: PeerCase, column: Column, device: torch.device, scratch: Path) -> None:
        self.case = case
        self.runner = Runner(_package("accelerate").Accelerator, column, device, compiles=False)
        self.accelerator = self.runner.accelerator
        self.vae = self.runner.network(_network(case))
        if self.runner.compiles:
            for part in (self.vae.encoder, self.vae.decoder):
                part.compile()
        self.optimizer = self.runner.optimizer(self.vae.parameters(), lr=1e-4, weight_decay=1e-2)
        self.perceptual: nn.Module | None = None
        if case.kind == AS_RUN:
            network = Perceptual(PerceptualConfig(weights=str(random_vgg(scratch)))).lpips
            self.perceptual = self.runner.network(network).eval()
        self.vae.train()
        self.draws = draws_of(
            torch.arange(case.ours.batch_size), case.ours.latent_shape, label_dropout=0.0, logit_normal=False
        )
        batch: Any = case.ours.batch(case.ours.config(scratch, {}), device)
        self.images = self.runner.maps(to_model_range(batch.images).contiguous())

    def __call__(self) -> None:
        self._step()

    def first(self) -> FirstStep:
        """The first step, with our draw of the latents, by ours' names."""
        gradients: dict[str, Tensor] = {}
        losses = self._step(self.draws.posterior.to(self.runner.device), gradients)
        renamed = from_diffusers(gradients, _our_sizes(self.case))
        return FirstStep(losses, {f"vae.autoencoder.{name}": value for name, value in renamed.items()})

    def _step(self, noise: Tensor | None = None, gradients: dict[str, Tensor] | None = None) -> dict[str, float]:
        vae, images = self.vae, self.images
        with self.accelerator.autocast():
            posterior = vae.encode(images).latent_dist
            latents = posterior.sample() if noise is None else posterior.mean + posterior.std * noise
            pictures = vae.decode(latents).sample
            pixels = nn.functional.mse_loss(pictures.float(), images.float(), reduction="none")
            nll = pixels
            perceptual = None
            if self.perceptual is not None:
                with torch.no_grad():
                    perceptual = self.perceptual(pictures, images)
                nll = nll + PERCEPTUAL_WEIGHT * perceptual
            nll = nll.sum() / len(nll)
            kl = posterior.kl()
            kl = kl.sum() / len(kl)
            loss = nll + KL_WEIGHT * kl
        losses = {"loss": loss.item(), "reconstruction": pixels.detach().mean().item(), "kl": kl.item()}
        if perceptual is not None:
            losses["lpips"] = perceptual.mean().item()
        self.accelerator.backward(loss)
        if gradients is not None:
            gradients |= gradients_of(vae, "", self.runner.loss_scale)
        self.accelerator.clip_grad_norm_(vae.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # the script's default
        return losses
