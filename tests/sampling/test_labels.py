import pytest
import torch

from sendvae_fast.errors import UserError
from sendvae_fast.sampling.labels import sample_labels


def test_equal_labels_are_balanced():
    labels = sample_labels(0, torch.arange(60), num_classes=12)
    assert torch.bincount(labels, minlength=12).tolist() == [5] * 12


def test_random_labels_are_uniform_and_depend_on_seed_and_id_alone():
    ids = torch.arange(12_000)
    labels = sample_labels(0, ids, 12, "random")
    assert ((torch.bincount(labels, minlength=12) - 1000).abs() < 4 * (1000 * 11 / 12) ** 0.5).all()
    assert torch.equal(sample_labels(0, ids[5::7], 12, "random"), labels[5::7])
    assert not torch.equal(sample_labels(1, ids, 12, "random"), labels)


def test_unknown_label_sampling():
    with pytest.raises(UserError, match="label sampling"):
        sample_labels(0, torch.arange(3), 12, "sorted")
