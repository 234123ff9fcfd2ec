"""Memory and arithmetic of a pretended step: those of the real one."""

import dataclasses
import gc
import json

import pytest
import torch
from tiny_runs import E2E, SIT, VAE
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from sendvae_fast import ops
from sendvae_fast.config import build_config, merge
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.flops import count_flops
from sendvae_fast.plan.fake_step import (
    EMA,
    FROZEN,
    MOMENTS,
    WEIGHTS,
    Surroundings,
    build_stage,
    fake_step,
    random_batch,
    without_files,
)
from sendvae_fast.plan.live_bytes import ACTIVATIONS, GRADIENTS, LiveBytes
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.vae.settings import VAETrainConfig

AROUND = Surroundings(num_classes=24, latent_shape=(4, 8, 8))
# Wide enough that maps and weights of a step are more than what PyTorch keeps beside them.
WIDE_VAE = {"autoencoder": {"base_channels": 32}, "discriminator": {"base_channels": 16}}
WIDE_SIT = {"generator": {"width": 128, "depth": 4, "num_heads": 4}}


def config_of(stage, **settings):
    own = {"vae": (VAETrainConfig, merge(VAE, WIDE_VAE)), "sit": (SiTTrainConfig, merge(SIT, WIDE_SIT))}
    own["e2e"] = (E2ETrainConfig, merge(E2E, WIDE_VAE | WIDE_SIT))
    kind, content = own[stage]
    content = merge(content, {"run": "x"} | ({"latents": "x"} if stage == "sit" else {}))
    if stage != "sit":
        content = merge(content, {"loss": {"perceptual": {"net": "squeeze", "weights": "x"}}})
    return build_config(kind, merge(content, settings))


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    return init_distributed("cpu")


def test_live_bytes_are_those_of_a_chain():
    """y = W x with 4 x 1000 inputs and 10 outputs: x, y, the loss, and backwards one gradient beside what is saved."""
    live = LiveBytes()
    with live:
        layer = nn.Linear(1000, 10, bias=False)
        live.claim(WEIGHTS, layer.parameters())
        live.claim_gradients(layer.parameters())
        live.claim_rest(FROZEN)
        assert live.now == {WEIGHTS: 40_000, ACTIVATIONS: 0, GRADIENTS: 0, FROZEN: 0}
        live.begin()
        x = torch.zeros(4, 1000)
        y = layer(x)
        assert live.now[ACTIVATIONS] == 16_000 + 160
        y.sum().backward()
        del y
        assert live.now[GRADIENTS] == 40_000 and live.now[ACTIVATIONS] == 16_000
        layer.weight.grad = None
        del x
    assert live.now == {WEIGHTS: 40_000, ACTIVATIONS: 0, GRADIENTS: 0, FROZEN: 0}
    assert live.peak[ACTIVATIONS] + live.peak[GRADIENTS] >= 56_160


def allocated_in_second_step(config, around, num_pictures, folder):
    """The most bytes that PyTorch's CPU allocator had given out at once, of all that was made here."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        stage = build_stage(config, around)
        batch = random_batch(stage, num_pictures, around)
        stage.train_step(0, batch)
        gc.collect()
        with record_function("the second"):
            stage.train_step(1, batch)
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    begin, end = next((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "the second" and "dur" in e)
    memory = [e for e in events if e.get("name") == "[memory]"]
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]  # what earlier profiles have left
    return max(e["args"]["Total Allocated"] for e in memory if begin <= e["ts"] <= end) - before


@pytest.mark.slow
@pytest.mark.parametrize("stage", [
    "vae",
    pytest.param("sit", marks=pytest.mark.repeats("plan/test_fake_step.py::test_the_peak_is_that_of_a_real_step")),
])  # fmt: skip
def test_the_peak_is_that_of_a_real_step(stage, tmp_path):
    config = config_of(stage)
    planned = fake_step(config, 16, AROUND)
    real = allocated_in_second_step(without_files(config, 1), AROUND, 16, tmp_path)
    assert sum(planned.state.values()) + planned.peak_with_gradients == pytest.approx(real, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [
    pytest.param("vae", marks=pytest.mark.repeats("plan/test_fake_step.py::test_state_is_counted_to_the_byte")), "e2e"
])  # fmt: skip
def test_state_is_counted_to_the_byte(stage):
    step = fake_step(config_of(stage), 2, AROUND)
    count = sum(step.num_parameters.values())
    assert step.state[WEIGHTS] == 4 * count and step.state[MOMENTS] == 8 * count
    generator = step.num_parameters.get("sit", 0)
    assert step.state.get(EMA, 0) == 4 * generator


@pytest.mark.slow
def test_recomputation_needs_less():
    plain, recomputed = (fake_step(config_of("sit", engine={"recompute": on}), 16, AROUND) for on in (False, True))
    assert recomputed.peak_activations < 0.8 * plain.peak_activations and recomputed.state == plain.state


@pytest.mark.slow
def test_accumulation_keeps_all_gradients_at_the_peak():
    once, twice = (fake_step(config_of("sit", engine={"accumulation_steps": n}), 8, AROUND) for n in (1, 2))
    gradients = once.state[WEIGHTS]
    assert twice.gradients_at_peak == gradients
    assert twice.peak_activations == pytest.approx(once.peak_activations, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vae", "sit", "e2e"])
def test_the_parts_add_up_to_the_arithmetic_of_a_real_step(stage):
    """PyTorch's formulas over every product, convolution and attention of a step, forward and backward."""
    config = without_files(config_of(stage), 1)
    built = build_stage(config, AROUND)
    batch = random_batch(built, 4, AROUND)
    with ops.use_attention("math"):
        real = count_flops(lambda: built.train_step(config.loop.num_steps - 1, batch))
    assert sum(built.flops_by_part.values()) == pytest.approx(real / 4, rel=0.03)


def test_nothing_is_read_of_what_a_config_names():
    """Weights, latents and pictures of this config are not there."""
    config = config_of("vae", init_from="nowhere", discriminator_from="nowhere", alignment={"latent_norm": "fixed"})
    changed = without_files(config, 2)
    assert changed.init_from is changed.discriminator_from is None
    assert changed.loss.perceptual.random_weights and changed.alignment.foundation.random_weights
    assert changed.engine.accumulation_steps == 2 and dataclasses.asdict(changed.optimizer) == dataclasses.asdict(
        config.optimizer
    )
