"""LightningDiT's training step (github.com/hustvl/LightningDiT), from a checkout of it.

Network, transport with its losses, average and settings are the peer's; what stands in the `do_train` of its
`train.py` between these calls cannot be called, and is done here in the same order, without the DDP that it puts around
one process. Its blocks, embedders and last layer compile themselves as shipped.
"""

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.peers.case import Column, PeerCase, columns_of
from bench.peers.checkout import Checkout
from bench.peers.first_step import FirstStep, gradients_of
from bench.peers.ours import OurStep, draws_of
from bench.peers.theirs import Runner, fill_zero_weights, versions_of
from bench.step_cases import NUM_CLASSES, StepCase
from sendvae_fast.models.sit.published_layouts import from_published

NAME, OPTION = "LightningDiT", "--lightningdit"
CONFIG = "configs/lightningdit_xl_vavae_f16d32.yaml"
NEEDED = ("load_config", "update_ema", "requires_grad", "create_transport", "Accelerator")
LABEL_DROPOUT = 0.1
LATENT = (32, 16, 16)


def open_checkout(folder: Path) -> Checkout:
    """The checkout in a folder; UserError for another folder."""
    return Checkout.of(NAME, OPTION, folder, ("train.py", "models/lightningdit.py", "transport/transport.py", CONFIG))


def packages() -> dict[str, str]:
    """Versions of the packages that its speed depends on."""
    return versions_of("accelerate", "timm")


def cases(device: torch.device) -> list[PeerCase]:
    """Its step: on a GPU the paper's XL/1, on a CPU a network of SiT-S's size."""
    file = "sit/lightningdit_xl_1.yaml"
    if device.type == "cuda":
        sizes = dict(input_size=16, patch_size=1, hidden_size=1152, depth=28, num_heads=16, num_classes=NUM_CLASSES)
        own = StepCase("sit", "LightningDiT-XL/1", file, {}, 32, LATENT)
        return [PeerCase("train", "LightningDiT-XL/1 on f16d32 latents", sizes, own)]
    sizes = dict(input_size=16, patch_size=1, hidden_size=384, depth=12, num_heads=6, num_classes=NUM_CLASSES)
    small = {
        "generator": {
            "preset": None, "patch_size": 1, "width": 384, "depth": 12, "num_heads": 6, "swiglu": True,
            "rms_norm": True, "rope": True,
        },
    }  # fmt: skip
    own = StepCase("sit", "LightningDiT-S/1", file, small, 2, LATENT)
    return [PeerCase("train", "LightningDiT of SiT-S/1's size on f16d32 latents", sizes, own)]


def columns(case: PeerCase, device: torch.device) -> list[Column]:
    """It trains in bfloat16, and compiles parts: compiling the whole network is a column."""
    return columns_of("bf16", False, device)


def theirs(case: PeerCase, column: Column, device: torch.device, checkout: Checkout, scratch: Path) -> "_Step":
    """The peer's step."""
    return _Step(case, column, device, checkout, scratch)


def ours(case: PeerCase, column: Column, device: torch.device, checkout: Checkout, scratch: Path) -> OurStep:
    """Our step with the peer's weights."""
    network = _network(case, checkout, checkout.module("train", *NEEDED))
    return OurStep(case.ours, column, {"sit": from_published(network.state_dict(), NAME)[1]}, None, device, scratch)


def _network(case: PeerCase, checkout: Checkout, script: Any) -> Any:
    """The peer's network, with the weights of both sides."""
    settings = script.load_config(str(checkout.folder / CONFIG))["model"]
    switches = {name: settings[name] for name in ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift")}
    torch.manual_seed(0)
    network = checkout.module("models.lightningdit", "LightningDiT").LightningDiT(
        **case.sizes, in_channels=settings["in_chans"], class_dropout_prob=LABEL_DROPOUT, **switches
    )
    fill_zero_weights(network)
    return network


class _Step:
    """The step of `train.py`.

    Args:
        case: what is built.
        column: how it is run.
        device: where it runs.
        checkout: the peer's code.
        scratch: a folder for files.
    """

    def __init__(self, case: PeerCase, column: Column, device: torch.device, checkout: Checkout, scratch: Path) -> None:
        self.script = script = checkout.module("train", *NEEDED)
        self.settings = script.load_config(str(checkout.folder / CONFIG))
        self.runner = Runner(script.Accelerator, column, device, compiles=False)
        self.accelerator = self.runner.accelerator
        self.network = self.runner.network(_network(case, checkout, script))
        self.ema = copy.deepcopy(self.network)
        script.requires_grad(self.ema, False)
        self.called = self.runner.prepared(self.network)
        rate, beta2 = self.settings["optimizer"]["lr"], self.settings["optimizer"]["beta2"]
        self.optimizer = self.runner.optimizer(self.network.parameters(), lr=rate, weight_decay=0, betas=(0.9, beta2))
        transport = self.settings["transport"]
        names = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps", "use_cosine_loss", "use_lognorm")
        self.transport = script.create_transport(**{name: transport[name] for name in names})
        self.draws = draws_of(
            torch.arange(case.ours.batch_size), case.ours.latent_shape,
            label_dropout=LABEL_DROPOUT, logit_normal=True,
        )  # fmt: skip
        self.batch: Any = case.ours.batch(case.ours.config(scratch, {}), device)
        self.latents = self.runner.maps(self.batch.mean + self.batch.std * self.draws.posterior.to(device))
        self.called.train()

    def __call__(self) -> None:
        self._step(self.batch.labels)

    def first(self) -> FirstStep:
        """The first step, with our draws, by ours' names and in the weights as ours has them.

        Its time runs from noise to data. Going from its weights to ours is a reflection of some and a change of sign of
        others: so it is for their gradients.
        """
        device = self.runner.device
        noise, t = self.draws.noise.to(device), self.draws.t.to(device)
        labels = torch.where(self.draws.dropped.to(device), NUM_CLASSES, self.batch.labels)
        gradients: dict[str, Tensor] = {}
        with (
            patch.object(self.transport, "sample", lambda x, *_: (1 - t, self.runner.maps(noise), x)),
            patch.object(self.network.y_embedder, "dropout_prob", 0.0),
        ):
            losses = self._step(labels, gradients)
        state = {name: value.detach().cpu() for name, value in self.network.state_dict().items()}
        turned = from_published({**state, **gradients}, NAME)[1]
        return FirstStep(losses, {f"sit.{name}": turned[name] for name in gradients})

    def _step(self, labels: Tensor, gradients: dict[str, Tensor] | None = None) -> dict[str, float]:
        terms = self.transport.training_losses(self.called, self.latents, dict(y=labels))
        velocity, direction = terms["loss"].mean(), terms["cos_loss"].mean()
        loss = direction + velocity
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if gradients is not None:
            gradients |= gradients_of(self.network, "", self.runner.loss_scale)
        self.optimizer.step()
        self.script.update_ema(self.ema, self.network)
        values = {"velocity": velocity.item()}  # which it reads at every step
        if gradients is not None:
            values |= {"loss": loss.item(), "direction": direction.item()}
        return values
