"""A disk that fails at the Nth call of a save that writes, once or from there on: nothing that was saved is lost."""

import builtins
import errno
import os
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from reliability_counts import counting, full_counts
from safetensors.torch import load_file

from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.files import save_tensors

pytestmark = pytest.mark.slow

NUM_FILES, NUM_CALLS = 5, 30


@contextmanager
def failing(monkeypatch, number, code, lasting):
    """From the `number`-th of the calls that change the disk, that one or all fail; yields a list of the calls made."""
    made = []

    def wrap(function):
        def call(*args, **kwargs):
            if function is opened and not ({"w", "a", "x"} & set(str(args[1] if len(args) > 1 else "r"))):
                return function(*args, **kwargs)
            made.append(function.__name__)
            if len(made) == number or (lasting and len(made) > number):
                raise OSError(code, os.strerror(code))
            return function(*args, **kwargs)

        return call

    opened = builtins.open
    with monkeypatch.context() as patch:
        for owner, name in (
            (builtins, "open"), (os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"),
            (safetensors.torch, "save_file"),
        ):  # fmt: skip
            patch.setattr(owner, name, wrap(getattr(owner, name)))
        yield made


def save(checkpointer, step):
    def write(directory):
        for number in range(NUM_FILES):
            save_tensors(directory / f"{number}.safetensors", {"value": torch.full((50,), float(step))})

    return checkpointer.save(step, write)


def test_errors_at_the_nth_write(tmp_path, monkeypatch, capsys):
    numbers = range(1, NUM_CALLS + 1) if full_counts() else (3, 29)
    with counting("disk-error", "EIO, ENOSPC, EACCES at the Nth write of a save, N to 30, once or lasting") as trials:
        for code in (errno.EIO, errno.ENOSPC, errno.EACCES):
            for lasting in (False, True):
                for number in numbers:
                    folder = tmp_path / f"{code}-{lasting}-{number}"
                    checkpointer = Checkpointer(folder, Distributed(), keep=1)
                    save(checkpointer, 1)
                    with failing(monkeypatch, number, code, lasting) as made:
                        saved = save(checkpointer, 2)
                    assert len(made) >= number, "so many calls are not made: the error was none"
                    with trials.trial((errno.errorcode[code], number, lasting)):
                        step, directory = checkpointer.load_latest()
                        assert step == 2 if saved else step in (1, 2)
                        for file in range(NUM_FILES):
                            value = load_file(directory / f"{file}.safetensors")["value"]
                            assert torch.equal(value, torch.full((50,), float(step)))
                        assert saved or "checkpoint of step 2 was not saved" in capsys.readouterr().err
                        assert save(checkpointer, 3) is not None
                        assert [path.name for path in folder.iterdir()] == ["step_00000003"]
