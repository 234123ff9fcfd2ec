"""Marks on our functions for Dynamo, without importing Dynamo, which would double the time of `import torch`."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_traced(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`: Dynamo calls it while tracing and burns its result into the graph.

    The mark is the one that PyTorch's decorator leaves, which imports all of `torch._dynamo` to do so.
    """
    function._dynamo_marked_constant = True
    return function
