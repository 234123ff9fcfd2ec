"""How Dynamo is told that a function is constant. That it listens, `test_contract` and `test_dispatch` show."""

import torch

from sendvae_fast.ops.tracing import constant_when_traced


def test_the_mark_is_that_of_pytorch():
    ours, theirs = (mark(lambda: None) for mark in (constant_when_traced, torch.compiler.assume_constant_result))
    assert vars(ours) and vars(ours) == vars(theirs)
