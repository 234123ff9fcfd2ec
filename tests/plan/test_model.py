"""Memory under ZeRO and time of a step: closed forms."""

import dataclasses

import pytest

from sendvae_fast.engine.settings import EngineConfig
from sendvae_fast.errors import UserError
from sendvae_fast.plan.fake_step import EMA, FROZEN, MOMENTS, WEIGHTS, FakeStep
from sendvae_fast.plan.gpus import GPUS, find_gpu, gpu_in
from sendvae_fast.plan.memory import CONTEXT_BYTES, SLACK_SHARE, memory_of, tensor_memory
from sendvae_fast.plan.settings import PlanConfig
from sendvae_fast.plan.speed import all_reduce_s, step_time

P = 1_000_000  # trained parameters
STATE = {WEIGHTS: 4 * P, FROZEN: 7 * P, MOMENTS: 8 * P, EMA: 4 * P}
BIG = FakeStep(
    num_pictures=8, state=STATE, peak_activations=90 * P, peak_with_gradients=91 * P, activations_at_peak=89 * P,
    num_parameters={"sit": P}, flops=None,
)  # fmt: skip
SMALL = dataclasses.replace(BIG, peak_activations=P, peak_with_gradients=2 * P, activations_at_peak=P)


def total(step, num_gpus, **engine):
    return sum(tensor_memory(step, EngineConfig(**engine), num_gpus).values()) / P


def test_one_gpu_under_ddp_holds_what_was_seen():
    assert total(BIG, 1, name="ddp") == 4 + 7 + 8 + 4 + 91


def test_ddp_has_buckets_beside_gradients():
    assert total(BIG, 4, name="ddp") == 4 + 7 + 8 + 4 + 91 + 4


@pytest.mark.parametrize(
    "stage, expected",
    [
        (0, 4 + 7 + 12 + 91),
        (1, 4 + 7 + 12 / 4 + 1 + 91 + 4),  # the copy of a quarter; the bucket holds all gradients
        (2, 4 + 7 + 12 / 4 + 1 + 90 + 4),  # of a first micro-batch nothing is reduced yet
        (3, 1 + 7 + 12 / 4 + 1 + 4 + 4 + 90 + 1 + 4),  # the weights are gathered, and so is the group they came in
    ],
)
def test_zero_splits(stage, expected):
    assert total(BIG, 4, zero_stage=stage) == pytest.approx(expected)


def test_gradients_that_wait_for_later_micro_batches_count():
    """ZeRO 2 keeps a rank's share of the first micro-batch's while the second is at its peak."""
    at_once, accumulated = (total(BIG, 4, zero_stage=2, accumulation_steps=steps) for steps in (1, 2))
    assert accumulated == pytest.approx(at_once + 1)


def test_the_last_reduction_counts_where_activations_are_few():
    """The bucket, at ZeRO 3 with a copy of it, beside a rank's share of the gradients."""
    few = dataclasses.replace(BIG, peak_activations=P // 2)
    assert total(few, 4, zero_stage=2) == pytest.approx(4 + 7 + 12 / 4 + 1 + 4 + 1)
    big = dataclasses.replace(few, state=STATE | {WEIGHTS: 4 * 60 * P}, num_parameters={"sit": 60 * P})
    weights, group = 240, 200  # of 60 M parameters, 50 M gathered at once
    shares = weights / 4 * 2 + 7 + 12 / 4 + weights / 4  # weights and their copy, frozen, moments and EMA, gradients
    assert total(big, 4, zero_stage=3) == pytest.approx(shares + weights + max(group + 0.5 + weights, 2 * weights))


def test_the_update_counts_where_activations_are_few():
    """ZeRO 1: all gradients, and a rank's share of them twice."""
    assert total(SMALL, 4, zero_stage=1) == pytest.approx(4 + 7 + 12 / 4 + 1 + 4 + 2)


def test_the_sums_of_the_parts_and_the_slack():
    engine = EngineConfig(name="ddp")
    memory, tensors = memory_of(BIG, engine, 1), tensor_memory(BIG, engine, 1)
    assert memory.slack == pytest.approx(SLACK_SHARE * 114 * P + CONTEXT_BYTES)
    assert memory.total == pytest.approx(sum(tensors.values()) + memory.slack)
    assert memory.weights == 4 * P and memory.frozen == 7 * P and memory.activations == 89 * P


def machines(gpus, **options):
    return PlanConfig(gpus=gpus, gpu="H100", link_share=1.0, mfu=0.5, **options)


def test_a_ring_of_all_reduce():
    """2 (n - 1) / n of the bytes over each link; between nodes a GPU's eighth of them over its adapter."""
    assert all_reduce_s(450e9, machines(1)) == 0
    assert all_reduce_s(450e9, machines(2)) == pytest.approx(1.0)
    assert all_reduce_s(450e9, machines(8)) == pytest.approx(2 * 7 / 8)
    assert all_reduce_s(450e9, machines(32)) == pytest.approx(2 * 7 / 8 + 2 * 3 / 4 * 450 / 8 / 50)
    assert all_reduce_s(450e9, machines(32, gpus_per_node=1)) == pytest.approx(2 * 31 / 32 * 450 / 50)


def time_of(engine, gpus=8, flops=989.5e12, parameters=10**9, **options):
    options = {"has_ema": True, "recomputes": False} | options
    return step_time(flops, parameters, EngineConfig(**engine), machines(gpus), **options)


def test_ddp_hides_what_the_backward_pass_covers():
    exchange = 2 * 7 / 8 * 4e9 / 450e9
    time = time_of({"name": "ddp"})
    assert time.arithmetic_s == pytest.approx(2.0) and time.exchange_s == pytest.approx(exchange)
    assert time.exposed_s == 0
    assert time.optimizer_s == pytest.approx(40e9 / 3.35e12)
    assert time_of({"name": "ddp"}, flops=0).exposed_s == pytest.approx(exchange)


def test_deepspeed_waits_for_its_exchange_and_splits_the_optimizer():
    exchange = 2 * 7 / 8 * 4e9 / 450e9
    one, three = (time_of({"zero_stage": stage}) for stage in (1, 3))
    assert one.exposed_s == pytest.approx(exchange) and three.exposed_s == pytest.approx(1.5 * exchange)
    assert one.optimizer_s == pytest.approx(40e9 / 8 / 3.35e12)
    assert one.total_s == pytest.approx(one.arithmetic_s + one.optimizer_s + exchange)


def test_recomputation_is_a_third_more():
    assert time_of({"name": "ddp"}, recomputes=True).arithmetic_s == pytest.approx(2.0 * 4 / 3)


def test_gpus_are_told_by_their_names():
    assert gpu_in("NVIDIA H100 PCIe").name == "H100 PCIe" and gpu_in("NVIDIA H200").name == "H200"
    assert gpu_in("Tesla T4") is None
    assert all(gpu.flops_per_s > 1e14 and gpu.memory_bytes >= 24e9 for gpu in GPUS.values())
    with pytest.raises(UserError, match="--gpu=T4 is no kind .* H200"):
        find_gpu("T4")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"mfu": 1.5}, "mfu is 1.5"),
        ({"gpus": 12}, "does not fill nodes"),
        ({"price": -1.0}, "price is -1.0"),
        ({"latent": (4, 0, 8)}, "latent is"),
    ],
)
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        PlanConfig(**options)
