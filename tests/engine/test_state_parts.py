"""Tensors in parts: put together where the parts are those of a tensor, refused where they are not."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from sendvae_fast.engine.state_parts import Part, open_parts, rank_file
from sendvae_fast.errors import UserError
from sendvae_fast.reading import reading

WHOLE = torch.arange(12.0).reshape(3, 4)


def read(folder, *files, shape=WHOLE.shape):
    for rank, tensors in enumerate(files):
        save_file(tensors, rank_file(folder, rank))
    with reading(folder, "use another"), open_parts(folder, len(files)) as parts:
        return parts.read("a", shape)


@pytest.mark.parametrize("cuts", [(0, 12), (0, 5, 12), (0, 1, 2, 12)])
def test_what_was_cut_is_put_together(cuts, tmp_path):
    """Any rank's file may have any of them: a tensor's parts are ordered by where they begin, 10 after 2."""
    files = [{"b": torch.ones(1)}, {}]
    for number, (start, end) in enumerate(itertools.pairwise(cuts)):
        name, values = Part(start, WHOLE.flatten()[start:end]).named("a", WHOLE.shape)
        files[(number + 1) % 2][name] = values.clone()
    assert torch.equal(read(tmp_path, *files), WHOLE)


BAD = {
    "of another shape": [{"a": torch.ones(4, 3)}],
    "no more than the first": [{"a@0": torch.ones(5)}],
    "without the first": [{"a@5": torch.ones(7)}],
    "with a gap": [{"a@0": torch.ones(4)}, {"a@5": torch.ones(7)}],
    "that overlap": [{"a@0": torch.ones(6)}, {"a@5": torch.ones(7)}],
    "too many": [{"a@0": torch.ones(5)}, {"a@5": torch.ones(9)}],
    "too few": [{"a@0": torch.ones(5)}, {"a@5": torch.ones(6)}],
    "twice": [{"a": WHOLE}, {"a": WHOLE}],
    "not flat": [{"a@0": torch.ones(1, 5)}, {"a@5": torch.ones(7)}],
    "from before the beginning": [{"a@-5": torch.ones(5)}, {"a@0": torch.ones(12)}],
    "without a number": [{"a@x": torch.ones(5)}, {"a@5": torch.ones(7)}],
}


@pytest.mark.parametrize("kind", BAD)
def test_parts_that_make_no_tensor_are_refused(kind, tmp_path):
    with pytest.raises(UserError, match="damaged, or no file of its kind .*use another") as caught:
        read(tmp_path, *BAD[kind])
    assert str(caught.value).isprintable()
