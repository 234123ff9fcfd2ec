import numpy as np
import pytest
import torch

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.pictures import Pictures
from sendvae_fast.evaluation.probing import encoding
from sendvae_fast.evaluation.probing.encoding import encoded_rows
from sendvae_fast.evaluation.result import PicturesOrigin


class Numbered(Pictures):
    """Pictures of one pixel that show their number."""

    origin = PicturesOrigin(path="", num_pictures=37, image_size=1, sha256="x", hash_of="names")

    def batches(self, batch_size, start=0, stop=None):
        for first in range(start, 37 if stop is None else stop, batch_size):
            ids = torch.arange(first, min(first + batch_size, 37 if stop is None else stop))
            yield ids.to(torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)


def all_of(rows):
    return torch.cat([block for _, block in rows.blocks()]).numpy()


def test_a_killed_job_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "NOTE_EVERY_BATCHES", 2)
    seen = []

    def encode(images, stop_at=None):
        seen.extend(images[:, 0, 0, 0].tolist())
        if stop_at is not None and seen[-1] >= stop_at:
            raise KeyboardInterrupt
        return images.float() / 4

    with pytest.raises(KeyboardInterrupt):
        encoded_rows(lambda images: encode(images, 20), "a", Numbered(), tmp_path, 4, Distributed())
    seen.clear()
    rows = encoded_rows(encode, "a", Numbered(), tmp_path, 4, Distributed())
    assert seen == list(range(16, 37))
    np.testing.assert_array_equal(all_of(rows), np.repeat(np.arange(37)[:, None] / 4, 3, axis=1))
    seen.clear()
    encoded_rows(encode, "a", Numbered(), tmp_path, 5, Distributed())
    assert not seen  # it is all there
    encoded_rows(encode, "other weights", Numbered(), tmp_path, 5, Distributed())
    assert seen[1:] == list(range(37))


def test_what_half_precision_cannot_hold_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not finite in half precision"):
        encoded_rows(lambda images: images.float() * 1e5, "a", Numbered(), tmp_path, 4, Distributed())
