"""A recorder for CPUs. A CUDA graph freezes all that Python decides while it records, and works on the same memory each
time; so does a tape of the operators that were called.
"""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sendvae_fast.ops import use_backend

READS_ON_THE_HOST = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select")


class Tape(TorchDispatchMode):
    """Keeps every operator with its tensors. To record changes nothing: what was written to is put back."""

    def __init__(self):
        super().__init__()
        self._calls, self._own, self._before = [], set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in READS_ON_THE_HOST:
            raise RuntimeError(f"{function} is read on the host, which no recording does again")
        kwargs = kwargs or {}
        written = [
            x
            for argument, given in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tensors_of(given)
        ]
        for storage in (x.untyped_storage() for x in written):
            if storage.data_ptr() not in self._own | self._before.keys():
                self._before[storage.data_ptr()] = storage, storage.clone()
        inputs = {x.untyped_storage().data_ptr() for x in tensors_of((args, kwargs))}
        out = function(*args, **kwargs)
        results = tensors_of(out)
        self._calls.append((function, args, kwargs, results))
        self._own |= {x.untyped_storage().data_ptr() for x in results} - inputs
        return out

    def rewind(self):
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, results in self._calls:
            for x, new in zip(results, tensors_of(function(*args, **kwargs)), strict=True):
                if x.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    x.copy_(new)


class TapeRecorder:
    """Records work on tapes."""

    def __init__(self):
        self.num_recordings = 0

    def active(self):
        return nullcontext()

    def run(self, work):
        return work()

    def record(self, work):
        self.num_recordings += 1
        with use_backend("reference"), Tape() as tape:  # what is compiled may write to what its schema does not say
            results = work()
        tape.rewind()

        def replay():
            tape.replay()
            return results

        return replay


def tensors_of(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
