from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sendvae_fast.evaluation.probing.directions import attribute_directions
from sendvae_fast.evaluation.probing.linear_fit import LinearModel
from sendvae_fast.evaluation.probing.rows import Rows
from sendvae_fast.evaluation.traversals import STEPS, selectivity, traverse


@pytest.mark.parametrize("kind", ["pattern", "weight"])
def test_a_step_moves_its_own_logit_by_one_deviation(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 2
    x[:, 5] = 7.0
    deviation = torch.where(torch.arange(6) < 5, x.std(dim=0, correction=0), torch.inf)
    model = LinearModel(torch.randn(3, 6, generator=generator), torch.ones(3), x.mean(dim=0), deviation)
    steps = attribute_directions(model, Rows(x), kind)
    logits = model.logits(Rows(x))
    for attribute in range(3):
        change = model.logits(Rows(x + steps[attribute]))[:, attribute] - logits[:, attribute]
        np.testing.assert_allclose(change, logits[:, attribute].std(correction=0), rtol=1e-4)
        if kind == "pattern":
            slopes = [np.polyfit(logits[:, attribute], x[:, i], 1)[0] for i in range(6)]
            expected = np.array(slopes) * logits[:, attribute].std(correction=0).item()
            np.testing.assert_allclose(steps[attribute], expected, atol=1e-4)
        else:
            assert steps[attribute, 5] == 0


def test_what_is_moved_is_what_the_judge_sees():
    """Latents are pictures; red is moved alone, green drags half as much blue along."""
    decoder = SimpleNamespace(decode=lambda z: z)
    pixels = torch.zeros(5, 3, 4, 4)
    directions = torch.zeros(3, 3, 4, 4)
    directions[0, 0], directions[1, 1], directions[1, 2] = 0.1, 0.2, 0.1
    config = SimpleNamespace(batch_size=4, num_shown=2)

    def judge(images):
        return images.float().mean(dim=(2, 3)) / 127.5

    spread = torch.tensor([1.0, 2.0, 0.5])
    moved = traverse(decoder, Rows(pixels), (3, 4, 4), directions.flatten(1), judge, spread, config)
    expected = torch.tensor([[0.1, 0, 0], [0, 0.1, 0.2], [0, 0, 0]]).expand(5, 3, 3)
    torch.testing.assert_close(moved.effects, expected, atol=0.003, rtol=0)  # a grey level over twice the reach
    assert len(moved.strips) == 2 and moved.strips[0].shape == (3, len(STEPS), 3, 4, 4)
    np.testing.assert_allclose(judge(moved.strips[0][0])[:, 0] - 1, 0.1 * np.array(STEPS), atol=0.01)
    assert selectivity(expected[:1]).item() == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert selectivity(torch.ones(1, 4, 4)).item() == 0.25 and selectivity(-torch.eye(3)[None]).item() == 0
