"""Steps replayed as CUDA graphs train what queued steps train."""

import pytest
import torch

from bench.step_cases import StepCase
from sendvae_fast.engine.build import NUM_FIRST_STEPS
from sendvae_fast.engine.distributed import init_distributed

# With Adam's usual eps a gradient that is all rounding moves its weight by a whole learning rate.
OPTIMIZER = {"eps": 1e-3, "learning_rate": 2e-3}
SIT = StepCase("sit", "small", "demo/sit.yaml", {
    "generator": {"width": 64, "depth": 2, "num_heads": 2, "projector_width": 64}, "data": {"image_size": 64},
    "repa": {"weight": 0.5, "block": 1, "foundation": {"name": "demo", "image_size": 64}},
    "flow": {"noise_level": "logit_normal", "logit_normal_steps": 3}, "optimizer": OPTIMIZER,
}, 8, (4, 8, 8))  # fmt: skip
VAE = StepCase("vae", "small", "demo/vae.yaml", {
    "data": {"image_size": 64},
    "alignment": {"method": "send", "foundation": {"name": "demo"}, "send": {"width": 64, "depth": 1, "num_heads": 2}},
    "discriminator": {"base_channels": 16, "num_layers": 2},
    "loss": {
        "gan_weight": 0.1, "discriminator_start_step": 1, "gan_start_step": 2, "gan_warmup_steps": 20,
        "gan_adaptive": True,
    },
    "optimizer": OPTIMIZER, "discriminator_optimizer": OPTIMIZER,
}, 8)  # fmt: skip
NUM_STEPS = NUM_FIRST_STEPS + 9


def train(case: StepCase, folder, **engine) -> tuple[dict, list[dict]]:
    """Weights after `NUM_STEPS` steps, with one that is not finite, and what was logged."""
    distributed = init_distributed("cuda")
    stage = case.build(folder, {"name": "ddp", **engine}, distributed)
    batch, logged = case.batch(stage.config, distributed.device), []
    for step in range(NUM_STEPS):
        of_step = batch
        if step == NUM_STEPS - 3 and case is SIT:
            of_step = batch._replace(mean=torch.full_like(batch.mean, torch.nan))
        logged.append({name: float(value) for name, value in stage.train_step(step, of_step).items()})
    assert stage.engine.num_skipped == (case is SIT)
    return stage.engine.full_state("model"), logged


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [SIT, VAE], ids=["sit", "vae"])
def test_replayed_steps_train_as_queued_ones(case, precision, tmp_path, monkeypatch):
    """As near to a queued run as another queued run is, but for a factor: atomics make no two runs the same."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    queued, again = (train(case, tmp_path, precision=precision) for _ in range(2))
    replayed = train(case, tmp_path, precision=precision, cuda_graph=True)
    start = case.build(tmp_path, {"name": "ddp"}, init_distributed("cuda")).engine.full_state("model")
    for name, wanted in queued[0].items():
        if not wanted.is_floating_point():
            assert torch.equal(replayed[0][name], wanted), name
            continue
        moved = (wanted - start[name]).norm()
        noise = (again[0][name] - wanted).norm()
        assert (replayed[0][name] - wanted).norm() <= 10 * noise + 1e-5 * moved, name
    assert queued[1][0].keys() == replayed[1][0].keys()
