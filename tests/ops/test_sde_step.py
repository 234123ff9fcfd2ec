import math

import pytest
import torch
from op_cases.common import require_backend
from op_cases.sde_step import SCALE, StepCase

from sendvae_fast.ops import chosen_backend, philox, sde_step, sde_step_reference, use_backend

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    require_backend("sde_step", request.param)
    with use_backend(request.param):
        yield request.param


def make_inputs(dtype=torch.float32, **options):
    return StepCase((3, 4, 6, 5), **options).inputs(dtype, "cpu", 0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_reference_is_the_formula(guided, last):
    x, velocity, times, key, ids = make_inputs(torch.float64, guided=guided)
    out = sde_step_reference(x, velocity, times, key, ids, guidance_scale=SCALE if guided else None, last=last)
    t, t_next = times.tolist()
    if guided:
        velocity = velocity[3:] + SCALE * (velocity[:3] - velocity[3:])
    # The score form of the drift, as the published samplers write it.
    score, diffusion = -((1 - t) * velocity + x) / t, 2 * t
    expected = x + (velocity - 0.5 * diffusion * score) * (t_next - t)
    if not last:
        noise = philox.normal(key, philox.Stream.SAMPLER_STEP, ids, (4, 6, 5), dtype=torch.float64)
        expected = expected + math.sqrt(2 * t * (t - t_next)) * noise
    torch.testing.assert_close(out.x, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(out.network_input, out.x) and out.network_input.data_ptr() != out.x.data_ptr()


@pytest.mark.parametrize("state", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_without_noise_the_state_is_the_references_bit_for_bit(backend, state, guided):
    inputs = make_inputs(torch.bfloat16, state=state, guided=guided)
    options = dict(guidance_scale=SCALE if guided else None, last=True)
    assert torch.equal(sde_step(*inputs, **options).x, sde_step_reference(*inputs, **options).x)


def test_the_last_step_does_not_look_at_the_noise(backend):
    x, velocity, times, key, ids = make_inputs()
    one = sde_step(x, velocity, times, key, ids, last=True)
    other = sde_step(x, velocity, times, key + 1, ids + 1, last=True)
    assert torch.equal(one.x, other.x)
    assert not torch.equal(one.x, sde_step(x, velocity, times, key, ids).x)


def test_samples_do_not_depend_on_the_batch(backend):
    x, velocity, times, key, ids = make_inputs(guided=True)
    whole = sde_step(x, velocity, times, key, ids, guidance_scale=SCALE)
    order = torch.tensor([2, 0])
    both = torch.cat((order, order + 3))
    part = sde_step(x[order], velocity[both], times, key, ids[order], guidance_scale=SCALE)
    assert torch.equal(whole.x[order], part.x) and torch.equal(whole.network_input[order], part.network_input)


def test_nan_goes_through(backend):
    x, velocity, *rest = make_inputs(torch.bfloat16)
    x[0, 0, 0, 1], velocity[1, 2, 3, 4] = math.nan, math.nan
    out = sde_step(x, velocity, *rest)
    expected = torch.zeros(x.shape, dtype=torch.bool)
    expected[0, 0, 0, 1], expected[1, 2, 3, 4] = True, True
    assert torch.equal(out.x.isnan(), expected) and torch.equal(out.network_input.isnan(), expected)


def test_inputs_are_left_alone_and_no_graph_is_built(backend):
    x, velocity, *rest = make_inputs(guided=True)
    before = x.clone(), velocity.clone()
    out = sde_step(x.requires_grad_(), velocity.requires_grad_(), *rest, guidance_scale=SCALE)
    assert torch.equal(x, before[0]) and torch.equal(velocity, before[1])
    assert not out.x.requires_grad and not out.network_input.requires_grad


def test_the_velocity_chooses_the_backend():
    require_backend("sde_step", "cpu")
    x, velocity, *rest = make_inputs()
    assert chosen_backend("sde_step", "cpu") == "cpu"
    compiled = torch.ops.sendvae.sde_step(x, velocity, *rest, None, False)[0]
    assert torch.equal(sde_step(x, velocity, *rest).x, compiled)
    with use_backend("cpu"):
        exact = sde_step(x, velocity.double(), *rest).x
    assert torch.equal(exact, sde_step_reference(x, velocity.double(), *rest).x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, 4, 6)), "x must be"),
        (dict(x=torch.zeros(3, 4, 0, 5)), "x must be"),
        (dict(x=torch.zeros(3, 4, 6, 5, dtype=torch.bfloat16)), "x must be float64 or float32"),
        (dict(velocity=torch.zeros(3, 4, 6, 5, dtype=torch.int64)), "velocity must be float32"),
        (dict(velocity=torch.zeros(3, 4, 5, 6)), "velocity must be"),
        (dict(guidance_scale=2.0), r"velocity must be torch.float32 \[6, 4, 6, 5\]"),
        (dict(times=torch.zeros(2)), "times must be torch.float64"),
        (dict(key=torch.zeros(3, dtype=torch.int64)), "key must be"),
        (dict(sample_ids=torch.zeros(2, dtype=torch.int64)), "sample_ids must be"),
        (dict(times=torch.zeros(2, dtype=torch.float64, device="meta")), "one device"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(zip(("x", "velocity", "times", "key", "sample_ids"), make_inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        sde_step(**arguments)
