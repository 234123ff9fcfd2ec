"""Replayed functions: what is recorded when, and that results and inputs are everyone's own."""

import pytest
import torch
from recording import TapeRecorder

from sendvae_fast.engine.replayed_functions import Replayed

CPU = torch.device("cpu")


def test_a_result_outlives_the_next_call():
    replayed = Replayed(lambda x, factor: {"y": x * factor}, TapeRecorder(), CPU, 0)
    x = torch.ones(2)
    first = replayed(x, torch.tensor(2.0))["y"]
    second = replayed(x, torch.tensor(3.0))["y"]
    assert (first == 2).all() and (second == 3).all()


def test_a_recording_is_of_one_kind_of_call():
    """Shapes, dtypes and the host's decisions each have their own, after the first calls."""
    seen = []

    def double(x, other, *, up):
        seen.append((x.shape, x.dtype, up))
        return (x * 2 if up else x / 2, other)

    recorder = TapeRecorder()
    replayed = Replayed(double, recorder, CPU, 2)
    calls = [(torch.full((2,), 3.0), True), (torch.full((2,), 4.0), False), (torch.full((1,), 5.0), True)]
    for number in range(5):
        for x, up in calls:
            assert replayed(x, None, up=up)[0].tolist() == (x * 2 if up else x / 2).tolist()
        assert recorder.num_recordings == replayed.num_recordings == (0 if number < 2 else 3)
    assert len(seen) == 3 * 3  # two first calls and the recording of each kind; replays do not come back to Python
    assert replayed(torch.tensor([3], dtype=torch.int64), None, up=True)[0].tolist() == [6]


def test_decisions_are_frozen_in_a_recording():
    """What is not a part of the key is what it was when it was recorded: the reason for the key."""
    factor = 2.0
    replayed = Replayed(lambda x: x * factor, TapeRecorder(), CPU, 0)
    assert replayed(torch.ones(1)).item() == 2
    factor = 3.0
    assert replayed(torch.ones(1)).item() == 2


def test_what_cannot_be_told_apart_is_an_error():
    with pytest.raises(TypeError, match="unhashable"):
        Replayed(lambda x, *, how: x, TapeRecorder(), CPU, 0)(torch.ones(1), how=[1])
