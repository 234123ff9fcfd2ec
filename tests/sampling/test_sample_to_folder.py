"""A sampling job from the command line: what resumes, on how many ranks, and what it says when something is wrong."""

import json
import signal
import subprocess
import time
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from time_limits import HANG_S
from tiny_networks import save_decoder, save_generator
from two_ranks import run_on_two_ranks

from sendvae_fast.cli.main import main
from sendvae_fast.sampling.writer import PngFolder

ROOT = Path(__file__).parents[2]
NUM = 20


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    return [f"--generator={save_generator(root / 'sit')}", f"--autoencoder={save_decoder(root / 'vae')}"]


def arguments(networks, out, *more):
    return ["sample", *networks, f"--out={out}", f"--num_samples={NUM}", "--sampler.num_steps=3", *more]


@pytest.fixture(scope="module")
def whole(networks, tmp_path_factory):
    """All pictures, drawn in one batch on one rank."""
    out = tmp_path_factory.mktemp("whole") / "a.b"
    assert main(arguments(networks, out, f"--batch_size={NUM}", "--npz")) == 0
    return out


def pictures(out: Path) -> np.ndarray:
    """uint8 [N, H, W, 3]."""
    return np.stack([np.asarray(Image.open(out / f"{i:06d}.png")) for i in range(NUM)])


def assert_same_pictures(one: Path, other: Path) -> None:
    """Labels and noise are the same bits in any batch; a matrix product may round otherwise in a batch of another size,
    which moves a value at the edge of two grey levels to the other one.
    """
    a, b = pictures(one).astype(int), pictures(other).astype(int)
    assert np.abs(a - b).max() <= 1 and (a != b).mean() < 1e-3
    assert a.std() > 10 and np.abs(a[0] - a[1]).max() > 10


def test_what_is_written(whole):
    assert sorted(path.name for path in whole.parent.iterdir()) == ["a.b", "a.b.npz", "a.b.png"]
    names = [f"{i:06d}.png" for i in range(NUM)]
    assert sorted(path.name for path in whole.iterdir()) == [*names, "settings.yaml"]
    assert np.array_equal(np.load(f"{whole}.npz")["arr_0"], pictures(whole))
    with Image.open(f"{whole}.png") as grid:
        assert grid.size == (5 * 18 - 2, 4 * 18 - 2)  # 20 pictures of 16 px in 5 columns


def forked(command, folder):
    (folder / "commands.json").write_text(json.dumps([command]))
    return run_on_two_ranks(ROOT / "tests" / "cli" / "verbs_of_ranks.py", folder / "commands.json")


def under_torchrun(command, folder):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "sendvae_fast"]
    return forks.run([*launcher, *command], cwd=ROOT)


@pytest.mark.parametrize("on_two_ranks", [
    forked,
    pytest.param(
        under_torchrun, marks=pytest.mark.repeats("engine/test_launch.py::test_torchrun_and_deepspeed")
    ),
])  # fmt: skip
def test_two_ranks_and_batches_of_seven_draw_the_same(networks, whole, tmp_path, on_two_ranks):
    done = on_two_ranks(arguments(networks, tmp_path / "two", "--batch_size=7", "--npz"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("20 pictures") == 1
    assert_same_pictures(tmp_path / "two", whole)
    assert np.array_equal(np.load(tmp_path / "two.npz")["arr_0"], pictures(tmp_path / "two"))


def test_a_killed_job_goes_on_where_it_stopped(networks, whole, tmp_path):
    """SIGKILL between two batches; what it left behind is a half-written file and a damaged picture."""
    out = tmp_path / "out"
    command = ["-m", "sendvae_fast", *arguments(networks, out, "--batch_size=2")]
    process = forks.start(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    folder, deadline = PngFolder(out), time.monotonic() + HANG_S
    while len(folder.sample_ids()) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    drawn = folder.sample_ids()
    assert len(drawn) >= 4
    for sample_id in drawn[8:]:  # it was quicker than the signal
        folder.path(sample_id).unlink()
    drawn = drawn[:8]
    folder.path(1).write_bytes(folder.path(1).read_bytes()[:40])
    (out / ".000015.png.tmp-host-99").write_bytes(b"half")
    before = {i: folder.path(i).stat().st_mtime_ns for i in drawn}
    assert main(arguments(networks, out, "--batch_size=3")) == 0
    assert_same_pictures(out, whole)
    kept = [i for i in drawn if folder.path(i).stat().st_mtime_ns == before[i]]
    assert kept == [i for i in drawn if i != 1]
    assert not list(out.glob("*.tmp*"))


def test_more_pictures_can_be_added_and_moved_weights_are_the_same_weights(networks, whole, tmp_path):
    out = tmp_path / "out"
    assert main(arguments(networks, out, "--num_samples=5")) == 0
    before = (out / "000003.png").stat().st_mtime_ns
    vae = save_decoder(tmp_path / "elsewhere")
    assert main(arguments([networks[0], f"--autoencoder={vae}"], out, "--batch_size=4")) == 0
    assert_same_pictures(out, whole)
    assert (out / "000003.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("--seed=1", "other settings (seed was 0, now 1): repeat them, or give another folder"),
        ("--guidance_scale=1.5", "guidance_scale was 2.5, now 1.5"),
        ("--sampler.kind=heun", "sampler.kind was sde, now heun"),
        ("--generator=OTHER", "generator_sha256 was"),
        ("--autoencoder=WIDE", "makes latents of 4 channels but the autoencoder decodes 5"),
        ("--generator=/nowhere", "/nowhere does not exist"),
        ("--num_samples=0", "num_samples is 0"),
        ("--guidance_scale=0.5", "guidance scale is 0.5; give 1 (no guidance) or more"),
        ("--guidance_interval=[0.5,0.2]", "guidance interval is [0.5, 0.2]"),
    ],
)
def test_what_does_not_fit_is_one_line(networks, whole, tmp_path, capsys, changed, said):
    others = {"OTHER": lambda: save_generator(tmp_path / "s", seed=5), "WIDE": lambda: save_decoder(tmp_path / "w", 5)}
    for name, make in others.items():
        if name in changed:
            changed = changed.replace(name, str(make()))
    before = pictures(whole)
    assert main(arguments(networks, whole, changed)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert np.array_equal(pictures(whole), before)


def test_a_generator_without_label_dropout_cannot_be_guided(networks, tmp_path, capsys):
    sit = f"--generator={save_generator(tmp_path / 'sit', label_dropout=0.0)}"
    assert main(arguments([sit, networks[1]], tmp_path / "out")) == 2
    assert "trained without label dropout" in capsys.readouterr().err
    assert main(arguments([sit, networks[1]], tmp_path / "out", "--guidance_scale=1", "--num_samples=1")) == 0


def test_what_was_refused_before_the_first_picture_binds_nobody(networks, tmp_path, capsys):
    few = ["--num_samples=1"]
    assert main(arguments(networks, tmp_path / "out", *few, "--guidance_channels=5")) == 2
    assert "guidance_channels is 5, but the generator's latents have 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.yaml").write_text("seed: 5\n")  # of a job that was stopped while it started
    assert main(arguments(networks, tmp_path / "out", *few)) == 0
    assert main(arguments(networks, tmp_path / "out", *few, "--seed=5")) == 2


def test_pictures_of_unknown_origin_are_not_added_to(networks, tmp_path, capsys):
    PngFolder(tmp_path / "out").write([3], torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert main(arguments(networks, tmp_path / "out")) == 2
    assert "holds pictures but no settings.yaml" in capsys.readouterr().err


def test_equal_labels_of_a_number_that_does_not_divide_are_noted(networks, tmp_path, capsys):
    for num, noted in ((4, True), (6, False)):
        assert main(arguments(networks, tmp_path / "out", "--labels=equal", f"--num_samples={num}")) == 0
        assert ("not a multiple of the 3 classes" in capsys.readouterr().err) is noted
