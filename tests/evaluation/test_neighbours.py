import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation import neighbours
from sendvae_fast.evaluation.neighbours import precision_recall


def two_sets(shift=1.0, num=60, other=45, dim=6):
    """Far from the origin, where |x|² + |y|² - 2 x y loses digits."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.normal(size=(n, dim)) + 100 + s).float() for n, s in ((num, shift), (other, 0))]


def brute_force(samples, reference, neighbour):
    """By the definition, point by point, in float64."""
    samples, reference = samples.double().numpy(), reference.double().numpy()

    def share(points, centres):
        radii = [sorted(np.linalg.norm(centres - centre, axis=1))[neighbour] for centre in centres]
        return np.mean([any(np.linalg.norm(centres - point, axis=1) <= radii) for point in points])

    return share(samples, reference), share(reference, samples)


@pytest.mark.parametrize("neighbour", [1, 3])
def test_agrees_with_brute_force_and_torch_fidelity(neighbour):
    samples, reference = two_sets()
    values = precision_recall(samples, reference, neighbour)
    assert 0.1 < values[0] < values[1] < 0.9 or 0.1 < values[1] < values[0] < 0.9
    assert values == pytest.approx(brute_force(samples, reference, neighbour))
    centred = [features.double() - 100 for features in (samples, reference)]
    assert values == pytest.approx(calculate_precision_recall_full(*centred, neighbour))


@pytest.mark.parametrize("numbers", [1, 7 * 45, 10**9])
def test_blocks_change_nothing(monkeypatch, numbers):
    samples, reference = two_sets()
    expected = precision_recall(samples, reference)
    monkeypatch.setattr(neighbours, "BLOCK_NUMBERS", numbers)
    assert precision_recall(samples, reference) == expected


def test_same_and_distant_sets():
    samples, reference = two_sets(shift=1000.0)
    assert precision_recall(reference, reference) == (1.0, 1.0)
    assert precision_recall(samples, reference) == (0.0, 0.0)
    with pytest.raises(UserError, match="more than 3 pictures"):
        precision_recall(samples[:3], reference)
