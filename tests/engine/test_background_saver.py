"""Checkpoints written beside the steps: what they hold, what an error does, what a kill leaves."""

import threading
import time

import pytest
import torch
from engine_cases import ENGINES, make_engine, make_network, states, train
from kills import killed_at
from safetensors.torch import load_file

from sendvae_fast.engine import checkpoint
from sendvae_fast.engine.background_saver import BackgroundSaver
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.snapshot import LARGEST
from sendvae_fast.files import save_tensors

pytestmark = pytest.mark.slow


def saver_of(folder, **options):
    return BackgroundSaver(Checkpointer(folder, Distributed(), keep=2), Distributed(), **options)


def copied(value, before=lambda: None):
    """What `begin` is given: one tensor, and what the writer does first."""

    def take(snapshot):
        tensor = snapshot.copy("weight", value)

        def write(directory):
            before()
            save_tensors(directory / "model.safetensors", {"weight": tensor})

        return write

    return take


def wait_for(event):
    assert event.wait(60), "nobody came"


@pytest.mark.parametrize("kind", ENGINES)
def test_a_save_beside_the_steps_is_that_of_its_step(kind, one_rank, tmp_path):
    """The optimizer steps on while the writer is held up, and writes what a save that is waited for writes."""
    engine, stepped = make_engine(kind, make_network()), threading.Event()

    def take(snapshot):
        state = {key: engine.copy_full_state(key, snapshot) for key in ("model", "ema")}
        write_engine = engine.snapshot(snapshot)

        def write(directory):
            wait_for(stepped)
            write_engine(directory / "engine")
            for key, tensors in state.items():
                save_tensors(directory / f"{key}.safetensors", tensors)

        return write

    train(engine, range(2))
    truth = states(engine)
    saver = saver_of(tmp_path)
    saver.begin(2, take)
    train(engine, range(2, 5))
    stepped.set()
    beside = saver.finish()
    assert not torch.equal(engine.full_state("model")["last.bias"], truth["model"]["last.bias"])
    for key in ("model", "ema"):
        written = load_file(beside / f"{key}.safetensors")
        assert written.keys() == truth[key].keys()
        assert all(torch.equal(written[name], truth[key][name]) for name in written)
    written = load_file(beside / "engine" / "optimizer_rank0.safetensors")
    for key in ("exp_avg", "exp_avg_sq", "ema"):
        for name in engine.trained:
            assert torch.equal(written[f"{key}/{name}"], truth[key][name]), (key, name)
    engine.load_model(truth["model"])
    engine.load(beside / "engine")
    assert engine.num_updates == 2
    engine.close()


def test_only_one_at_a_time(tmp_path):
    saver, lock, many = saver_of(tmp_path), threading.Lock(), []

    def alone():
        many.append(not lock.acquire(blocking=False))
        time.sleep(0.05)
        lock.release()

    for step in range(1, 6):
        saver.begin(step, copied(torch.ones(2) * step, alone))
    assert saver.finish().name == "step_00000005" and many == [False] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


def test_an_error_of_the_writer_surfaces_at_the_next_step(tmp_path):
    saver, go = saver_of(tmp_path), threading.Event()

    def fail():
        wait_for(go)
        raise ZeroDivisionError("a bug")

    saver.begin(1, copied(torch.ones(2), fail))
    saver.settle()  # still writing
    go.set()
    saver._thread.join()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        saver.settle()
    saver.settle()
    saver.begin(2, copied(torch.ones(2)))
    assert saver.finish().name == "step_00000002"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_without_a_background_the_step_waits(tmp_path):
    saver = saver_of(tmp_path, in_background=False)
    saver.begin(1, copied(torch.ones(2), lambda: time.sleep(0.1)))
    assert not saver.is_writing and (tmp_path / "step_00000001" / "manifest.json").exists()


def test_leaving_by_an_error_waits_for_the_writer(tmp_path):
    with pytest.raises(ZeroDivisionError), saver_of(tmp_path) as saver:
        saver.begin(1, copied(torch.ones(2), lambda: time.sleep(0.1)))
        raise ZeroDivisionError
    checkpoint.verify(tmp_path / "step_00000001")


@pytest.mark.parametrize("broken", [float("nan"), float("-inf"), 1e19, -3e38])
def test_unsound_state_does_not_push_out_a_sound_checkpoint(broken, tmp_path, capsys):
    saver = saver_of(tmp_path)
    for step in (1, 2):
        saver.begin(step, copied(torch.full((4,), LARGEST)))
    value = torch.zeros(2, 3)
    value[1, 1] = broken
    saver.begin(3, copied(value))
    assert saver.finish() is None
    assert "checkpoint of step 3 was not saved (rank 0: weight has" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_kill_at_every_point_of_a_save_beside_steps(tmp_path):
    """The process dies in the middle of a step, at every call of the writer that changes the disk."""
    killed, event = True, 0
    while killed:
        event += 1
        folder = tmp_path / str(event)
        saver = saver_of(folder)
        saver.begin(1, copied(torch.ones(3)))
        saver.finish()

        def steps(saver=saver):
            saver.begin(2, copied(torch.full((3,), 2.0)))
            while saver.is_writing:
                saver.settle()

        killed = killed_at(event, steps, ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"))
        step, directory = Checkpointer(folder, Distributed()).load_latest()
        assert torch.equal(load_file(directory / "model.safetensors")["weight"], torch.full((3,), float(step)))
        saver = saver_of(folder)
        saver.begin(3, copied(torch.ones(3)))
        assert saver.finish().name == "step_00000003"
        assert not list(folder.glob("*.tmp-*"))
    assert event > 10
