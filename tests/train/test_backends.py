"""Fused ops train as plain PyTorch does: the same curves over 10 steps of both stages, switched by SENDVAE_BACKEND."""

import json

import pytest
import torch
from tiny_runs import cache_of, sit_config, vae_config

from sendvae_fast.engine.loggers import GROUPS
from sendvae_fast.ops import chosen_backend
from sendvae_fast.ops.dispatch import ENVIRONMENT_VARIABLE, OPS
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow

NUM_STEPS = 10
# One rounding per step, all the same way. Training that amplifies rounding has no such bound: these runs take small
# steps, and nothing in them has a kink (L1, the GAN's LeakyReLU and hinge, LPIPS's ReLU).
TOLERANCE = NUM_STEPS * torch.finfo(torch.float32).eps
SMOOTH = {"optimizer": {"learning_rate": 3e-4, "eps": 1e-3}, "loop": {"num_steps": NUM_STEPS}}


@pytest.fixture(params=["vae", "sit"])
def train(request, images, tmp_path, monkeypatch):
    """A function that trains one stage on a backend (None: each op's own choice) and returns its curves by name."""
    if request.param == "sit":
        untrained = {"loop": {"num_steps": 1}, "alignment": {"method": "none"}, "loss": {"gan_weight": 0.0}}
        train_vae(vae_config(tmp_path / "untrained", images, **untrained))
        latents = cache_of(tmp_path / "untrained", images, tmp_path / "latents")

    def curves(backend):
        run = tmp_path / f"{request.param}_{backend}"
        if backend is None:
            monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        if request.param == "vae":
            loss = {"reconstruction": "l2", "gan_weight": 0.0}
            train_vae(vae_config(run, images, loss=loss, **SMOOTH))
        else:
            train_sit(sit_config(run, images, latents, **SMOOTH))
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        names = logged[0].keys() - {"step", "time_s", *GROUPS["speed"]}
        return {name: torch.tensor([entry[name] for entry in logged], dtype=torch.float64) for name in names}

    return curves


def test_fused_and_reference_give_the_same_curves(train):
    if "cpu" not in {chosen_backend(op, "cpu") for op in OPS}:
        pytest.skip("the compiled library is not built")
    fused, reference = train(None), train("reference")
    assert fused.keys() == reference.keys() and {"loss", "align", "grad_norm"} <= fused.keys()
    for name, curve in reference.items():
        assert curve.shape == (NUM_STEPS,)
        # A loss may pass through zero, its terms do not.
        torch.testing.assert_close(
            fused[name], curve, rtol=TOLERANCE, atol=TOLERANCE * curve.abs().mean().item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
    assert any(not torch.equal(fused[name], reference[name]) for name in fused), "the switch changes nothing"
