import math

import pytest
import torch

from sendvae_fast.errors import UserError
from sendvae_fast.sampling.guidance import guided

NUM_CLASSES = 10


class ScaledByLabel:
    """A model whose velocity is x times (label + 1), and which remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels):
        self.calls.append((x, t, labels))
        return x * (labels + 1).to(x.dtype)[:, None, None, None], None


def evaluate(t, scale=2.5, interval=(0.2, 0.65), dtype=torch.float32):
    model = ScaledByLabel()
    velocity = guided(model, torch.tensor([3, 0, 9]), scale, interval, NUM_CLASSES)
    x = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    return model, x, velocity(x, torch.tensor(t, dtype=torch.float64))


@pytest.mark.parametrize("t", [0.2, 0.4, 0.65])
def test_inside_the_interval_and_at_both_ends_one_doubled_batch_is_guided_on_all_channels(t):
    model, x, velocity = evaluate(t)
    [(_, times, labels)] = model.calls
    assert labels.tolist() == [3, 0, 9, 10, 10, 10]
    assert times.shape == (6,) and times.dtype == torch.float32
    torch.testing.assert_close(times, torch.full((6,), t))
    conditional = x * torch.tensor([4.0, 1.0, 10.0])[:, None, None, None]
    unconditional = x * 11
    torch.testing.assert_close(velocity, unconditional + 2.5 * (conditional - unconditional))


@pytest.mark.parametrize(("t", "scale"), [(0.4, 2.5), (0.7, None)])
def test_uncombined_velocities_are_what_the_call_combines(t, scale):
    model = ScaledByLabel()
    velocity = guided(model, torch.tensor([3, 0]), 2.5, (0.2, 0.65), NUM_CLASSES)
    x = torch.randn(2, 5, 2, 2)
    parts, given = velocity.uncombined(x, torch.tensor(t, dtype=torch.float64))
    assert given == scale
    labels = [4.0, 1.0] if scale is None else [4.0, 1.0, 11.0, 11.0]
    expected = x.repeat(len(labels) // 2, 1, 1, 1) * torch.tensor(labels)[:, None, None, None]
    torch.testing.assert_close(parts, expected)


def test_only_the_first_channels_are_guided_and_the_others_take_the_labels_velocity():
    x = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 0, 9])
    velocity = guided(ScaledByLabel(), labels, 2.5, (0.2, 0.65), NUM_CLASSES, channels=3)
    conditional = x * torch.tensor([4.0, 1.0, 10.0])[:, None, None, None]
    outside = velocity(x, torch.tensor(0.7, dtype=torch.float64))
    assert torch.equal(outside, conditional)
    inside = velocity(x, torch.tensor(0.65, dtype=torch.float64))
    everywhere = guided(ScaledByLabel(), labels, 2.5, (0.2, 0.65), NUM_CLASSES)(x, torch.tensor(0.65))
    assert torch.equal(inside[:, :3], everywhere[:, :3]) and torch.equal(inside[:, 3:], conditional[:, 3:])
    assert not torch.isclose(everywhere, conditional).any()


@pytest.mark.parametrize("t", [0.0, math.nextafter(0.2, 0), math.nextafter(0.65, 1), 1.0])
def test_outside_the_interval_only_the_labels_are_evaluated(t):
    model, x, velocity = evaluate(t)
    [(_, _, labels)] = model.calls
    assert labels.tolist() == [3, 0, 9]
    torch.testing.assert_close(velocity, x * torch.tensor([4.0, 1.0, 10.0])[:, None, None, None])


def test_scale_one_is_no_guidance():
    model, *_ = evaluate(0.4, scale=1.0)
    assert model.calls[0][2].tolist() == [3, 0, 9]


def test_the_decision_can_be_taken_at_another_time():
    model = ScaledByLabel()
    velocity = guided(model, torch.tensor([3]), 2.0, (0.0, 0.5), NUM_CLASSES)
    x = torch.randn(1, 1, 2, 2)
    velocity.decide_at(0.5)(x, torch.tensor(0.6, dtype=torch.float64))
    velocity.decide_at(0.6)(x, torch.tensor(0.5, dtype=torch.float64))
    assert [len(labels) for _, _, labels in model.calls] == [2, 1]
    assert [round(float(t[0]), 3) for _, t, _ in model.calls] == [0.6, 0.5]


def test_bfloat16_velocities_are_combined_in_float32():
    model, x, velocity = evaluate(0.4, dtype=torch.bfloat16)
    conditional, unconditional = model(x.repeat(2, 1, 1, 1), None, model.calls[0][2])[0].float().chunk(2)
    assert torch.equal(velocity, unconditional + 2.5 * (conditional - unconditional))


def test_times_keep_float32_for_a_bfloat16_network():
    model, *_ = evaluate(0.4, dtype=torch.bfloat16)
    assert model.calls[0][0].dtype == torch.bfloat16
    assert model.calls[0][1].dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "scale", "interval", "said"),
    [
        ([0], 0.5, (0, 1), "guidance scale is 0.5"),
        ([0], 2.0, (0.7, 0.2), "guidance interval"),
        ([0], 2.0, (-0.1, 0.2), "guidance interval"),
        ([0, 11], 2.0, (0, 1), "10 classes"),
        ([-1], 2.0, (0, 1), "10 classes"),
    ],
)
def test_what_is_out_of_range_is_named(labels, scale, interval, said):
    with pytest.raises(UserError, match=said):
        guided(ScaledByLabel(), torch.tensor(labels), scale, interval, NUM_CLASSES)


def test_guiding_no_channel_is_refused():
    with pytest.raises(UserError, match="guidance channels is 0"):
        guided(ScaledByLabel(), torch.tensor([0]), 2.0, (0, 1), NUM_CLASSES, channels=0)
