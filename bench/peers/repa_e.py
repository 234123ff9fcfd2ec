"""REPA-E's two training steps (github.com/End2End-Diffusion/REPA-E), from a checkout of it.

`train_ldm_only.py` trains a SiT with REPA's alignment on cached latents, `train_repae.py` autoencoder, discriminator
and SiT together. Networks, losses, averages, samplers of latents and settings are the scripts'; what stands in their
`main` between these calls cannot be called, and is done here in the same order. Their foundation model is fetched by
torch.hub: features are given instead, to both sides, and it is in neither's time. LPIPS has random VGG weights, on both
sides.
"""

import copy
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lpips
import torch
import torchvision
from torch import Tensor, nn

from bench.peers.case import Column, PeerCase, columns_of
from bench.peers.checkout import Checkout
from bench.peers.first_step import FirstStep, gradients_of
from bench.peers.ours import Draws, OurStep, Weights, draws_of
from bench.peers.theirs import Runner, allow_tf32, fill_zero_weights, random_features, versions_of
from bench.step_cases import NUM_CLASSES, StepCase, random_vgg
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.losses.settings import PerceptualConfig
from sendvae_fast.models.autoencoder.published import ldm_state
from sendvae_fast.models.sit.published_layouts import from_published
from sendvae_fast.models.weights import read_weights

NAME, OPTION = "REPA-E", "--repa_e"
LATENTS_ONLY, END_TO_END = "train_ldm_only", "train_repae"
NEEDED = ("parse_args", "update_ema", "requires_grad", "Accelerator")
LOSS_CONFIG = "configs/l1_lpips_kl_gan.yaml"
FOUNDATION = "its foundation model left out on both sides, whose features are given"
POSITIONS: dict[str, Any] = {"generator": {"trained_positions": True}}
"""Its end-to-end script trains the position embedding, too: its requires_grad switches that on with all else."""


def open_checkout(folder: Path) -> Checkout:
    """The checkout in a folder; UserError for another folder."""
    files = (f"{LATENTS_ONLY}.py", f"{END_TO_END}.py", "models/sit.py")
    return Checkout.of(NAME, OPTION, folder, files)


def packages() -> dict[str, str]:
    """Versions of the packages that its speed depends on."""
    return versions_of("accelerate", "timm")


def cases(device: torch.device) -> list[PeerCase]:
    """A step of either kind: on a GPU the paper's networks, on a CPU SiT-S and the whole autoencoder at 64 px."""
    if device.type == "cuda":
        sit, latent = _sizes(28, 1152, 16, 16, 768), (32, 16, 16)
        return [
            PeerCase(
                LATENTS_ONLY, "SiT-XL/1 with REPA on f16d32 latents", sit,
                StepCase("sit", "SiT-XL/1", "sit/xl_1.yaml", {}, 32, latent), remark=FOUNDATION,
            ),
            PeerCase(
                END_TO_END, "f16d32 and SiT-XL/1 end to end, 256 px", sit,
                StepCase("e2e", "SiT-XL/1", "e2e/va_vae.yaml", POSITIONS, 32, latent), remark=FOUNDATION,
            ),
        ]  # fmt: skip
    small = {"generator": {"preset": "SiT-S/1"}, "repa": {"foundation": {"name": "dinov2-vit-s"}}}
    on_latents = StepCase("sit", "SiT-S/1", "sit/xl_1.yaml", small, 2, (32, 16, 16))
    at_64_px = {
        "generator": {"preset": "SiT-S/1", **POSITIONS["generator"]}, "data": {"image_size": 64},
        "repa": {"foundation": {"name": "dinov2-vit-s", "grid_size": 4}},
    }  # fmt: skip
    together = StepCase("e2e", "SiT-S/1", "e2e/va_vae.yaml", at_64_px, 2, (32, 4, 4))
    return [
        PeerCase(
            LATENTS_ONLY, "SiT-S/1 with REPA on f16d32 latents", _sizes(12, 384, 6, 16, 384), on_latents,
            remark=FOUNDATION,
        ),
        PeerCase(
            END_TO_END, "f16d32 and SiT-S/1 end to end, 64 px", _sizes(12, 384, 6, 4, 384), together,
            remark=FOUNDATION,
        ),
    ]  # fmt: skip


def _sizes(depth: int, width: int, heads: int, latent_size: int, features: int) -> dict[str, Any]:
    """The arguments of its SiT, whose small presets lack the width of the last layer."""
    return dict(
        input_size=latent_size, patch_size=1, in_channels=32, hidden_size=width, decoder_hidden_size=width,
        depth=depth, num_heads=heads, num_classes=NUM_CLASSES, z_dims=[features],
    )  # fmt: skip


def columns(case: PeerCase, device: torch.device) -> list[Column]:
    """Its scripts compile by default, so that no column adds it, and train in float16."""
    return columns_of("fp16", True, device)


def theirs(case: PeerCase, column: Column, device: torch.device, checkout: Checkout, scratch: Path) -> Any:
    """The peer's step."""
    step = _LatentsOnly if case.kind == LATENTS_ONLY else _EndToEnd
    return step(case, column, device, checkout, scratch)


def ours(case: PeerCase, column: Column, device: torch.device, checkout: Checkout, scratch: Path) -> OurStep:
    """Our step with the peer's weights."""
    networks = _Networks(case, checkout, scratch)
    weights: Weights = {"sit": _our_names(networks.sit.state_dict())}
    stage = case.ours
    if networks.vae is not None:
        state = ldm_state(networks.vae.state_dict(), NAME)
        weights["vae"] = {f"autoencoder.{name}": value for name, value in state.items()}
        weights["discriminator"] = networks.losses.discriminator.state_dict()
        weights["sit"] |= {f"bn.{name}": value for name, value in networks.sit.bn.state_dict().items()}
        if networks.lpips_legacy_range:
            stage = _with_legacy_range(stage)
    step = OurStep(stage, column, weights, networks.features, device, scratch)
    if networks.vae is None:  # latents are normalised by what the peer's batch norm was given
        norm = networks.sit.bn
        step.stage.latent_mean = norm.running_mean.to(device)
        step.stage.latent_std = (norm.running_var + norm.eps).sqrt().to(device)
    return step


def _our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return from_published(state, NAME)[1]


def _with_legacy_range(case: StepCase) -> StepCase:
    settings = copy.deepcopy(case.settings)
    settings.setdefault("loss", {}).setdefault("perceptual", {})["legacy_range"] = True
    return StepCase(case.stage, case.name, case.file, settings, case.batch_size, case.latent_shape)


class _Networks:
    """The peer's networks with the weights of both sides, and what is given to both."""

    def __init__(self, case: PeerCase, checkout: Checkout, scratch: Path) -> None:
        self.script = checkout.module(case.kind, *NEEDED)
        self.settings: Namespace = self.script.parse_args(["--exp-name", "step"])
        sit = checkout.module("models.sit", "SiT").SiT
        torch.manual_seed(0)
        self.sit = sit(
            **case.sizes, class_dropout_prob=self.settings.cfg_prob, encoder_depth=self.settings.encoder_depth,
            fused_attn=self.settings.fused_attn, qk_norm=self.settings.qk_norm,
        )  # fmt: skip
        fill_zero_weights(self.sit)
        size, channels = case.sizes["input_size"], case.sizes["in_channels"]
        self.features = random_features(case.ours.batch_size, size * size, case.sizes["z_dims"][0])
        generator = torch.Generator().manual_seed(2)
        self.sit.init_bn(
            latents_scale=1 + 0.1 * torch.rand(channels, generator=generator),
            latents_bias=0.1 * torch.randn(channels, generator=generator),
        )
        self.draws = draws_of(
            torch.arange(case.ours.batch_size), (channels, size, size),
            label_dropout=self.settings.cfg_prob, logit_normal=False,
        )  # fmt: skip
        self.vae: nn.Module | None = None
        self.losses: Any = None
        if case.kind == END_TO_END:
            self._build_autoencoder(case, checkout, scratch)

    def _build_autoencoder(self, case: PeerCase, checkout: Checkout, scratch: Path) -> None:
        self.vae = checkout.module("models.autoencoder", "vae_models").vae_models["f16d32"]()
        loss = checkout.module("loss.losses", "ReconstructionLoss_Single_Stage").ReconstructionLoss_Single_Stage
        self.loss_settings = self.script.OmegaConf.load(checkout.folder / LOSS_CONFIG)
        with _nothing_fetched(checkout):
            self.losses = loss(self.loss_settings)
        vgg = random_vgg(scratch)
        _load_lpips(self.losses.perceptual_loss.lpips, read_weights(vgg))
        self.lpips_legacy_range = self._sees_legacy_range(vgg)

    @torch.no_grad()
    def _sees_legacy_range(self, vgg: Path) -> bool:
        """Whether LPIPS gets pictures of [-1, 1] as if they were in [0, 1], as before the peer's pull request 17."""
        x, y = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
        posterior = _NoPosterior()
        self.losses.eval()  # its batch norm's statistics stay
        _, terms = self.losses(x, y, posterior, 0, "generator")
        found = float(terms["perceptual_loss"]) / self.loss_settings.losses.perceptual_weight
        self.losses.train()
        for parameter in self.losses.discriminator.parameters():
            parameter.requires_grad_(True)  # its generator's pass has switched it off
        wanted = {
            legacy: float(Perceptual(PerceptualConfig(weights=str(vgg), legacy_range=legacy))(x, y))
            for legacy in (False, True)
        }
        return abs(found - wanted[True]) < abs(found - wanted[False])


class _NoPosterior:
    """A posterior that adds nothing to a loss."""

    def kl(self) -> Tensor:
        return torch.zeros(1)


@contextmanager
def _nothing_fetched(checkout: Checkout) -> Iterator[None]:
    """Let the peer's LPIPS be built without the weights that it fetches: they are replaced in any case."""
    module = checkout.module("loss.lpips", "LPIPS")
    vgg16 = torchvision.models.vgg16
    with (
        patch.object(torchvision.models, "vgg16", lambda **_: vgg16(weights=None)),
        patch.object(module.LPIPS, "load_pretrained", lambda self: None),
    ):
        yield


def _load_lpips(network: nn.Module, vgg: dict[str, Tensor]) -> None:
    """Give the peer's LPIPS VGG's features and the heads of the lpips package, as ours has."""
    heads = read_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth")
    state = network.state_dict()
    for name in state:
        if name.startswith("net.slice"):
            state[name] = vgg[name.split(".", 2)[2]]
        elif name in heads:
            state[name] = heads[name]
    network.load_state_dict(state)


class _Step:
    """What both steps have in common.

    Args:
        case: what is built.
        column: how it is run.
        device: where it runs.
        checkout: the peer's code.
        scratch: a folder for files.
    """

    def __init__(self, case: PeerCase, column: Column, device: torch.device, checkout: Checkout, scratch: Path) -> None:
        self.networks = networks = _Networks(case, checkout, scratch)
        self.script, self.settings = networks.script, networks.settings
        self.runner = runner = Runner(self.script.Accelerator, column, device, compiles=self.settings.compile)
        self.accelerator = runner.accelerator
        if column.compile == "shipped" and self.settings.allow_tf32:
            allow_tf32(True)
        self.sit = runner.network(networks.sit)
        self.ema = copy.deepcopy(self.sit)
        self.script.requires_grad(self.ema, False)
        self.called_sit = runner.prepared(self.sit)
        self.optimizer = self._optimizer(self.sit, self.settings.learning_rate)
        self.draws = Draws(*(value.to(device) for value in networks.draws))
        self.features = networks.features.to(device)
        self.batch: Any = case.ours.batch(case.ours.config(scratch, {}), device)
        self.gradients: dict[str, Tensor] | None = None

    def _optimizer(self, network: nn.Module, learning_rate: float) -> Any:
        settings = self.settings
        return self.runner.optimizer(
            network.parameters(), lr=learning_rate, betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay, eps=settings.adam_epsilon,
        )  # fmt: skip

    def _update(self, loss: Tensor, network: nn.Module, optimizer: Any, prefix: str) -> Tensor:
        """Backward pass, clipping, the optimizer's step; the gradients' norm."""
        self.accelerator.backward(loss)
        if self.gradients is not None:
            self.gradients |= gradients_of(network, prefix, self.runner.loss_scale)
        norm = self.accelerator.clip_grad_norm_(network.parameters(), self.settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _arguments(self, *, align_only: bool) -> dict[str, Any]:
        settings = self.settings
        names = ("weighting", "path_type", "prediction")
        return {**{name: getattr(settings, name) for name in names}, "align_only": align_only}

    def _logged(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Its scripts read every value of every step on the host."""
        return {name: self.accelerator.gather(value).mean().detach().item() for name, value in values.items()}

    def _first(self, step: Any, *arguments: Any) -> FirstStep:
        """A step whose labels were dropped beforehand, with its losses and gradients by ours' names."""
        self.gradients = {}
        embedder = self.sit.y_embedder
        with patch.object(embedder, "dropout_prob", 0.0):
            losses = step(*arguments)
        gradients, self.gradients = self.gradients, None
        return FirstStep(losses, gradients)

    @property
    def _dropped_labels(self) -> Tensor:
        return torch.where(self.draws.dropped, NUM_CLASSES, self.batch.labels)


class _LatentsOnly(_Step):
    """The step of `train_ldm_only.py`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.moments = torch.cat([self.runner.maps(self.batch.mean), self.runner.maps(self.batch.std)], dim=1)

    def __call__(self) -> None:
        latents = self.script.sample_posterior(self.moments, 1.0, 0.0)
        self._step(latents, self.batch.labels)

    def first(self) -> FirstStep:
        """The first step, with our draws."""
        latents = self.runner.maps(self.batch.mean + self.batch.std * self.draws.posterior)
        given = {"time_input": self.draws.t[:, None, None, None], "noises": self.draws.noise}
        return self._first(self._step, latents, self._dropped_labels, given)

    def _step(self, latents: Tensor, labels: Tensor, given: dict[str, Tensor] | None = None) -> dict[str, float]:
        with self.accelerator.accumulate(self.called_sit), self.accelerator.autocast():
            self.called_sit.train()
            self.sit.bn.eval()
            outputs = self.called_sit(
                x=latents, y=labels, zs=[self.features], loss_kwargs=self._arguments(align_only=False), **(given or {})
            )
            velocity, align = outputs["denoising_loss"].mean(), outputs["proj_loss"].mean()
            loss = velocity + self.settings.proj_coeff * align
            self._update(loss, self.sit, self.optimizer, "sit.")
            self.script.update_ema(self.ema, self.sit)
        values = self._logged({"loss": loss, "velocity": velocity, "align": align})
        # Its projection loss is minus the cosine, ours one minus it.
        values["align"] += 1
        values["loss"] += self.settings.proj_coeff
        return values


class _EndToEnd(_Step):
    """The step of `train_repae.py`."""

    def __init__(self, case: PeerCase, *arguments: Any) -> None:
        super().__init__(case, *arguments)
        networks, runner, settings = self.networks, self.runner, self.settings
        assert networks.vae is not None
        self.vae, self.losses = runner.network(networks.vae), runner.network(networks.losses)
        self.called_vae, self.called_losses = runner.prepared(self.vae), runner.prepared(self.losses)
        self.vae_optimizer = self._optimizer(self.vae, settings.vae_learning_rate)
        self.loss_optimizer = self._optimizer(self.losses, settings.disc_learning_rate)
        self.preprocess = self.script.preprocess_imgs_vae

    def __call__(self) -> None:
        self._step(self.batch.labels)

    def first(self) -> FirstStep:
        """The first step, with our draws."""
        given = {"time_input": self.draws.t[:, None, None, None], "noises": self.draws.noise}
        posterior = self.draws.posterior
        with patch.object(torch, "randn", lambda *_, **__: posterior):  # its posterior's only draw
            return self._first(self._step, self._dropped_labels, given)

    def _step(self, dropped_labels: Tensor, given: dict[str, Tensor] | None = None) -> dict[str, float]:
        settings, labels = self.settings, self.batch.labels
        self.vae.train()
        self.called_sit.train()
        with self.accelerator.accumulate(self.called_sit), self.accelerator.autocast():
            images = self.runner.maps(self.preprocess(self.batch.images))
            posterior, z, reconstruction = self.called_vae(images)
            self.script.requires_grad(self.called_sit, False)
            self.called_sit.eval()
            vae_loss, terms = self.called_losses(images, reconstruction, posterior, 0, "generator")
            aligned = self.called_sit(
                x=z, y=labels, zs=[self.features], loss_kwargs=self._arguments(align_only=True), **(given or {})
            )
            vae_align = aligned["proj_loss"].mean()
            vae_loss = vae_loss.mean() + settings.vae_align_proj_coeff * vae_align
            vae_norm = self._update(vae_loss, self.vae, self.vae_optimizer, "vae.autoencoder.")
            critic_loss, critic_terms = self.called_losses(images, reconstruction, posterior, 0, "discriminator")
            critic_loss = critic_loss.mean()
            critic_norm = self._update(critic_loss, self.losses, self.loss_optimizer, "")
            self.script.requires_grad(self.called_sit, True)
            self.called_sit.train()
            outputs = self.called_sit(
                x=z.detach(), y=dropped_labels, zs=[self.features], loss_kwargs=self._arguments(align_only=False),
                time_input=aligned["time_input"], noises=aligned["noises"],
            )  # fmt: skip
            velocity, align = outputs["denoising_loss"].mean(), outputs["proj_loss"].mean()
            loss = velocity + settings.proj_coeff * align
            norm = self._update(loss, self.sit, self.optimizer, "sit.")
            self.script.update_ema(self.ema, self.sit)
        weights = self.networks.loss_settings.losses
        values = self._logged({
            "loss": vae_loss, "velocity": velocity, "align": align, "autoencoder_align": vae_align,
            "reconstruction": terms["reconstruction_loss"], "lpips": terms["perceptual_loss"], "kl": terms["kl_loss"],
            "gan": terms["gan_loss"], "discriminator": critic_loss, "sit": loss, "vae_norm": vae_norm,
            "critic_norm": critic_norm, "norm": norm, "real": critic_terms["logits_real"],
            "fake": critic_terms["logits_fake"], "weighted_gan": terms["weighted_gan_loss"],
            "gan_factor": terms["discriminator_factor"], "d_weight": terms["d_weight"],
            "lecam": critic_terms["lecam_loss"],
        })  # fmt: skip
        return {
            "loss": values["loss"] + settings.vae_align_proj_coeff,
            "reconstruction": values["reconstruction"] / weights.reconstruction_weight,
            "lpips": values["lpips"] / weights.perceptual_weight,
            "kl": values["kl"] / weights.kl_weight,
            "align": values["align"] + 1,
            "autoencoder_align": values["autoencoder_align"] + 1,
            **{name: values[name] for name in ("gan", "discriminator", "velocity")},
        }
