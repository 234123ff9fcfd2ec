"""Checkouts of peers that are none: code of our own with the peers' interfaces, on plain networks.

Two networks are all that a comparison of training steps needs of REPA-E and LightningDiT; `write_repa_e` and
`write_lightningdit` write what calls them into a folder. Options make a step that is wrong in one place.
"""

import shutil
from pathlib import Path

PLAIN_SIT = Path(__file__).parents[1] / "models" / "plain_sit.py"

ACCELERATOR = """
import contextlib
import torch

class Accelerator:
    scaler = None

    def __init__(self, mixed_precision, cpu):
        self.on = mixed_precision == "bf16"

    def prepare(self, x):
        return x

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.on)

    def accumulate(self, *_):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def gather(self, x):
        return x

    def clip_grad_norm_(self, parameters, norm):
        return torch.nn.utils.clip_grad_norm_(parameters, norm)

@torch.no_grad()
def update_ema(ema, model):
    for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(parameter, 1e-4)

def requires_grad(model, flag=True):
    model.requires_grad_(flag)
"""

NETWORK = '''
import torch
from torch import nn
from plain_network import plain_sit
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig

class Network(SiT):
    """Parameters under the published names; what is computed with them is another implementation's."""

    def __init__(self, p, **sizes):
        super().__init__(SiTConfig(**sizes))
        self.heads, self.y_embedder.dropout_prob = sizes["num_heads"], p

    def run(self, x, t, labels, repa_block=0):
        if self.training and self.y_embedder.dropout_prob > 0:
            dropped = torch.rand(len(labels)) < self.y_embedder.dropout_prob
            labels = torch.where(dropped, self.config.num_classes, labels)
        state = self.state_dict(keep_vars=True)
        return plain_sit(state, x, t, labels, num_heads=self.heads, repa_block=repa_block)
'''

REPA_E_SCRIPT = """
import argparse
import torch
from stand_in import Accelerator, requires_grad, update_ema

def parse_args(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--exp-name", required=True)
    settings = dict(
        cfg_prob=0.5, encoder_depth=1, fused_attn=True, qk_norm=False, learning_rate=1e-4, adam_beta1=0.9,
        adam_beta2=0.999, adam_weight_decay=0.0, adam_epsilon=1e-8, max_grad_norm=1.0, proj_coeff=0.5, compile=False,
        allow_tf32=True, weighting="uniform", path_type="linear", prediction="v",
    )
    parser.set_defaults(**settings)
    return parser.parse_args(arguments)

def sample_posterior(moments, scale, bias):
    mean, std = moments.chunk(2, 1)
    return (mean + std * torch.randn_like(mean) - bias) * scale
"""

REPA_E_SIT = """
import torch
from network_of_stand_in import Network
from torch import nn

class SiT(Network):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, decoder_hidden_size, depth, num_heads,
                 num_classes, z_dims, class_dropout_prob, encoder_depth, fused_attn, qk_norm):
        super().__init__(
            class_dropout_prob, latent_size=input_size, patch_size=patch_size, latent_channels=in_channels,
            width=hidden_size, depth=depth, num_heads=num_heads, num_classes=num_classes, repa_dim=z_dims[0],
            repa_block=encoder_depth, projector_width=32,
        )
        self.block, self.bn = encoder_depth, nn.BatchNorm2d(in_channels, eps=1e-4, affine=False)

    def init_bn(self, latents_scale, latents_bias):
        self.bn.running_mean, self.bn.running_var = latents_bias, latents_scale ** -2

    def forward(self, x, y, zs, loss_kwargs, time_input=None, noises=None):
        n = self.bn(x)
        t = torch.rand(len(x), 1, 1, 1) if time_input is None else time_input
        noise = torch.randn_like(n) if noises is None else noises
        velocity, features = self.run((1 - t) * n + t * noise, t.flatten(), y, self.block)
        cosine = torch.cosine_similarity(FEATURES.float(), zs[0].float(), dim=-1)
        loss = ((velocity - noise + n) ** 2).flatten(1).mean(1) * FACTOR
        return {"denoising_loss": loss, "proj_loss": -cosine.mean()}
"""

LIGHTNINGDIT_SCRIPT = """
import torch
from stand_in import Accelerator, requires_grad, update_ema

def load_config(path):
    switches = dict(use_qknorm=False, use_swiglu=True, use_rope=True, use_rmsnorm=True, wo_shift=False)
    transport = dict(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None,
                     use_cosine_loss=True, use_lognorm=True)
    return {
        "model": {"in_chans": 4, **switches}, "optimizer": {"lr": 2e-4, "beta2": 0.95}, "transport": transport,
    }

class Transport:
    def sample(self, x):
        return torch.sigmoid(torch.randn(len(x))), torch.randn_like(x), x

    def training_losses(self, model, x, model_kwargs):
        t, noise, x = self.sample(x)
        part = t[:, None, None, None]
        velocity, target = model(part * x + (1 - part) * noise, t, **model_kwargs), x - noise
        cosine = torch.cosine_similarity(velocity, target, dim=1)
        return {"loss": ((velocity - target) ** 2).flatten(1).mean(1), "cos_loss": 1 - cosine.flatten(1).mean(1)}

def create_transport(**settings):
    return Transport()
"""

LIGHTNINGDIT = """
from network_of_stand_in import Network

class LightningDiT(Network):
    def __init__(self, input_size, patch_size, hidden_size, depth, num_heads, num_classes, in_channels,
                 class_dropout_prob, use_qknorm, use_swiglu, use_rope, use_rmsnorm, wo_shift):
        super().__init__(
            class_dropout_prob, latent_size=input_size, patch_size=patch_size, latent_channels=in_channels,
            width=hidden_size, depth=depth, num_heads=num_heads, num_classes=num_classes, swiglu=True, rms_norm=True,
            rope=True,
        )

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        for name in ("cos", "sin"):
            state[f"feat_rope.freqs_{name}"] = getattr(self.rope, name).repeat_interleave(2, dim=1)
        return state

    def forward(self, x, t, y):
        return self.run(x, t, y)[0]
"""


def write_repa_e(folder: Path, *, features: str = "features", factor: float = 1.0) -> Path:
    """A checkout of REPA-E whose features are this expression, and whose velocity loss is multiplied by a factor."""
    sit = REPA_E_SIT.replace("FEATURES", features).replace("FACTOR", repr(factor))
    files = {"train_ldm_only.py": REPA_E_SCRIPT, "train_repae.py": "", "models/sit.py": sit}
    return _write(folder, files)


def write_lightningdit(folder: Path) -> Path:
    """A checkout of LightningDiT."""
    return _write(folder, {
        "train.py": LIGHTNINGDIT_SCRIPT, "models/lightningdit.py": LIGHTNINGDIT, "transport/transport.py": "",
        "configs/lightningdit_xl_vavae_f16d32.yaml": "",
    })  # fmt: skip


def _write(folder: Path, files: dict[str, str]) -> Path:
    files |= {"stand_in.py": ACCELERATOR, "network_of_stand_in.py": NETWORK}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.copy(PLAIN_SIT, folder / "plain_network.py")
    return folder
