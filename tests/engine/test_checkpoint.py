"""The checkpoint protocol against kills, full disks and damage."""

import errno
import json
import os
import random
import shutil

import pytest
import torch
from kills import killed_at
from reliability_counts import counting
from safetensors.torch import load_file

from sendvae_fast.engine import checkpoint
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors

pytestmark = pytest.mark.slow

# Every call that changes the disk but for writing itself; a kill comes before each, which is after the one before.
DISK_CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def write(value, directory):
    (directory / "engine").mkdir()
    save_tensors(directory / "engine" / "state.safetensors", {"value": torch.full((100,), value, dtype=torch.float64)})
    save_tensors(directory / "model.safetensors", {"value": torch.full((50,), value, dtype=torch.float64)})


def save(checkpointer, step):
    return checkpointer.save(step, lambda directory: write(step, directory))


def value_of(found):
    step, directory = found
    values = {
        load_file(directory / name)["value"][0].item() for name in ("model.safetensors", "engine/state.safetensors")
    }
    assert values == {float(step)}
    return step


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_saves_finds_and_keeps_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", Distributed(), keep=2, config_hash="abc")
    assert checkpointer.load_latest() is None
    for step in (5, 100, 20_000, 123_456_789):
        directory = save(checkpointer, step)
        assert value_of(checkpointer.load_latest()) == step
        assert checkpointer.load_latest()[1] == directory
    assert names(tmp_path / "checkpoints") == ["step_00020000", "step_123456789"]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["step"] == 123_456_789 and manifest["config_hash"] == "abc" and manifest["world_size"] == 1
    assert set(manifest["files"]) == {"model.safetensors", "engine/state.safetensors"}


def test_milestones_stay_beside_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path, Distributed(), keep=2, keep_every=20)
    for step in (10, 20, 25, 30, 40, 50, 55):
        save(checkpointer, step)
    assert names(tmp_path) == ["step_00000020", "step_00000040", "step_00000050", "step_00000055"]
    assert value_of(checkpointer.load_latest()) == 55


def test_saving_a_step_again_keeps_the_valid_checkpoint(tmp_path):
    checkpointer = Checkpointer(tmp_path, Distributed())
    first = save(checkpointer, 7)
    before = (first / "manifest.json").stat().st_ino
    assert checkpointer.save(7, lambda directory: pytest.fail("written twice")) == first
    assert (first / "manifest.json").stat().st_ino == before


def test_kill_at_every_point_of_a_save(tmp_path):
    """Always a whole checkpoint to go on from, and nothing left over after the next save."""
    killed, event, found_new = True, 0, set()
    with counting("checkpoint-kill", "a kill before every call of a save that changes the disk") as kills:
        while killed:
            event += 1
            folder = tmp_path / str(event)
            checkpointer = Checkpointer(folder, Distributed(), keep=1)
            save(checkpointer, 1)
            killed = killed_at(event, lambda checkpointer=checkpointer: save(checkpointer, 2), DISK_CALLS)
            with kills.trial(event):
                for left in folder.glob("step_????????"):
                    checkpoint.verify(left)  # raises where a kill left half of a checkpoint under its name
                step = value_of(checkpointer.load_latest())
                found_new.add(step)
                assert step == 2 or killed
                save(checkpointer, 3)
                assert value_of(checkpointer.load_latest()) == 3
                assert names(folder) == ["step_00000003"]
    assert event > 15, "too few points: the calls are no longer seen"
    assert found_new == {1, 2}


def test_kill_while_replacing_a_damaged_checkpoint_of_the_same_step(tmp_path):
    killed, event = True, 0
    while killed:
        event += 1
        checkpointer = Checkpointer(tmp_path / str(event), Distributed(), keep=2)
        save(checkpointer, 1)
        damaged = save(checkpointer, 2)
        (damaged / "model.safetensors").write_bytes(b"")
        killed = killed_at(event, lambda checkpointer=checkpointer: save(checkpointer, 2), DISK_CALLS)
        assert value_of(checkpointer.load_latest()) in (1, 2)
        save(checkpointer, 2)
        assert value_of(checkpointer.load_latest()) == 2
        save(checkpointer, 3)
        assert names(tmp_path / str(event)) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir"])
def test_a_failing_disk_does_not_stop_training(tmp_path, monkeypatch, capsys, call):
    checkpointer = Checkpointer(tmp_path, Distributed(), keep=1)
    save(checkpointer, 1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        assert save(checkpointer, 2) is None
    assert "checkpoint of step 2 was not saved" in capsys.readouterr().err
    assert names(tmp_path) == ["step_00000001"], "what was written of it would keep the disk full"
    assert value_of(checkpointer.load_latest()) == 1
    save(checkpointer, 3)
    assert names(tmp_path) == ["step_00000003"]


def test_what_is_not_the_disk_is_raised(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Checkpointer(tmp_path, Distributed()).save(1, lambda directory: 1 / 0)


def test_the_old_one_goes_only_after_the_new_one_reads_back(tmp_path, monkeypatch, capsys):
    checkpointer = Checkpointer(tmp_path, Distributed(), keep=1)
    save(checkpointer, 1)
    rename = os.rename

    def damaging_rename(source, target):
        rename(source, target)
        (target / "model.safetensors").write_bytes(b"rot")

    monkeypatch.setattr(os, "rename", damaging_rename)
    assert save(checkpointer, 2) is None
    assert value_of(checkpointer.load_latest()) == 1
    assert "model.safetensors" in capsys.readouterr().err


def test_an_undeletable_directory_does_not_stop_training(tmp_path, monkeypatch, capsys):
    checkpointer = Checkpointer(tmp_path, Distributed(), keep=1)
    save(checkpointer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError(13, "not yours")))
        assert save(checkpointer, 2) is not None
    assert "cannot remove" in capsys.readouterr().err
    assert value_of(checkpointer.load_latest()) == 2


def files_of(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def damages(directory):
    """(description, function) of random bit flips, truncations, and losses of every file."""
    draw = random.Random(0)
    for path in files_of(directory):
        size = path.stat().st_size
        for _ in range(20):
            yield path, "flip", draw.randrange(size * 8)
        for length in {0, 1, size // 2, size - 1}:
            yield path, "cut", length
        yield path, "lose", None


def apply_damage(path, kind, where):
    if kind == "lose":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[:where]
    else:
        content[where // 8] ^= 1 << (where % 8)
    path.write_bytes(content)


def test_any_damage_is_found_and_the_one_before_is_used(tmp_path, capsys):
    checkpointer = Checkpointer(tmp_path / "checkpoints", Distributed(), keep=2)
    save(checkpointer, 1)
    newest = save(checkpointer, 2)
    shutil.copytree(newest, tmp_path / "sound")
    count = 0
    for path, kind, where in damages(newest):
        apply_damage(path, kind, where)
        assert value_of(checkpointer.load_latest()) == 1, (path, kind, where)
        message = capsys.readouterr().err
        assert "passing over damaged checkpoint" in message and path.name in message, (path, kind, where)
        shutil.copy(tmp_path / "sound" / path.relative_to(newest), path)
        count += 1
    assert count > 60
    assert value_of(checkpointer.load_latest()) == 2


def test_files_swapped_between_steps_are_found(tmp_path, capsys):
    checkpointer = Checkpointer(tmp_path, Distributed(), keep=3)
    one, two = save(checkpointer, 1), save(checkpointer, 2)
    shutil.copy(one / "model.safetensors", two / "model.safetensors")
    assert value_of(checkpointer.load_latest()) == 1
    shutil.copytree(one, tmp_path / "step_00000009")
    assert value_of(checkpointer.load_latest()) == 1
    assert "that of step 1" in capsys.readouterr().err


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_again_from_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    checkpointer = Checkpointer(tmp_path, Distributed())
    assert checkpointer.load_latest() is None
    (save(checkpointer, 1) / "manifest.json").unlink()
    (tmp_path / "step_00000002").mkdir()
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged \(2 of 2\).*start again from step 0"):
        checkpointer.load_latest()


def test_another_configuration_is_refused(tmp_path):
    save(Checkpointer(tmp_path / "checkpoints", Distributed(), config_hash="aaa"), 1)
    with pytest.raises(UserError, match=r"step_00000001 .*aaa.*bbb.*config\.yaml.*new run directory"):
        Checkpointer(tmp_path / "checkpoints", Distributed(), config_hash="bbb").load_latest()


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="keep is 0"):
        Checkpointer(tmp_path, Distributed(), keep=0)


def test_an_edited_manifest_is_refused(tmp_path):
    checkpointer = Checkpointer(tmp_path, Distributed())
    directory = save(checkpointer, 1)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CorruptCheckpointError, match="changed after it was written"):
        checkpoint.verify(directory)
