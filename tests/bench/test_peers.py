"""Peers' steps: the same ones are timed, others are refused before that, and what is missing is said in one line."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from stand_in_checkouts import write_lightningdit, write_repa_e
from torch._dynamo.exc import InternalTorchDynamoError

from bench import __main__ as bench_main
from bench import bandwidth, peers, table
from bench.peers import autoencoder_kl, lightningdit, repa_e, units
from bench.peers.case import COMPILED, HALF, OURS_IN_FP32, ROUNDED, TRUTH, TUNED, Column, PeerCase, columns_of
from bench.peers.first_step import BOUNDS, CAPS, Difference, FirstStep, bounds_of, check, difference
from bench.peers.units import Unit
from bench.step_cases import StepCase
from sendvae_fast.errors import UserError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SIZES = dict(input_size=4, patch_size=1, hidden_size=384, depth=1, num_heads=6, num_classes=1000)
SIT = {"preset": None, "width": 384, "depth": 1, "num_heads": 6, "projector_width": 32}
REPA_E = PeerCase(
    repa_e.LATENTS_ONLY, "tiny",
    {**SIZES, "in_channels": 4, "decoder_hidden_size": 384, "z_dims": [128]},
    StepCase("sit", "tiny", "demo/sit.yaml", {
        "generator": {**SIT, "patch_size": 1, "label_dropout": 0.5}, "data": {"image_size": 32},
        "repa": {"weight": 0.5, "block": 1, "foundation": {"name": "demo", "image_size": 32}},
    }, 2, (4, 4, 4)),
)  # fmt: skip
LIGHTNINGDIT = PeerCase(
    "train", "tiny", SIZES,
    StepCase("sit", "tiny", "sit/lightningdit_xl_1.yaml", {
        "generator": {**SIT, "patch_size": 1, "swiglu": True, "rms_norm": True, "rope": True},
    }, 2, (4, 4, 4)),
)  # fmt: skip


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Processes are this one, which is afterwards as it was."""
    modules, path, threads = dict(sys.modules), list(sys.path), torch.get_num_threads()
    monkeypatch.setattr(peers, "in_a_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(repa_e, "cases", lambda device: [REPA_E])
    monkeypatch.setattr(lightningdit, "cases", lambda device: [LIGHTNINGDIT])
    monkeypatch.setattr(bandwidth, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(peers, "COPY_SECONDS", 0.001)
    monkeypatch.setattr(units, "WARMUP_STEPS", 0)
    yield
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]
    for name, module in modules.items():
        sys.modules.setdefault(name, module)  # what a checkout's names had displaced
    sys.path[:] = path
    torch.set_num_threads(threads)


def difference_of_ours(peer: str, folder: Path, case: PeerCase):
    truth, ours = (peers.computed(Unit(peer, folder, case, column, "cpu", 1)) for column in (TRUTH, OURS_IN_FP32))
    assert len(truth.gradients) > 20 and truth.losses["loss"] > 0.5
    return difference(ours, truth)


def test_rows_of_equal_steps_and_their_table(here, tmp_path, monkeypatch, capsys):
    shipped, tuned, ours = (
        Column("as shipped", "fp32"),
        Column(TUNED, "fp32", tuned=True),
        Column("ours", "fp32", ours=True),
    )
    monkeypatch.setattr(repa_e, "columns", lambda case, device: [shipped, tuned, ours])
    folder = write_repa_e(tmp_path / "REPA-E")
    arguments = ["peers", f"--repa_e={folder}", "--threads=1", "--iterations=2", "--repeats=1", f"--out={tmp_path}"]
    assert bench_main.main([*arguments, "--columns", TUNED, "ours"]) == 0
    (file,) = tmp_path.glob("peers_*.json")
    (row,) = json.loads(file.read_text())
    assert list(row["columns"]) == [TUNED, "ours"] and row["equal_mathematics"] and row["copy_bytes_per_s"] > 0
    for column in row["columns"].values():
        assert column["img_per_s"] == pytest.approx(2e6 / column["median_us"]) and column["median_us"] > 1e3
        assert column["first_step"]["gradient"] < 1e-5
    text = table.peers_tables(tmp_path)
    assert f"| REPA-E | tiny, batch 2 | {TUNED} | fp32 |" in text and "| 1.00x [1.00, 1.00] |" in text
    assert "  ours in float32 " in capsys.readouterr().out


def test_a_column_that_torch_cannot_compile_is_left_out_and_told(here, tmp_path, monkeypatch, capsys):
    shipped = Column("as shipped", "fp32", compile="shipped")
    monkeypatch.setattr(
        repa_e, "columns", lambda case, device: [shipped, replace(shipped, name=COMPILED, compile="whole")]
    )
    computed, at = peers.computed, "whole"

    def fails(unit):
        if unit.column.compile == at:
            raise InternalTorchDynamoError("no graph\nof this")
        return computed(unit)

    monkeypatch.setattr(peers, "computed", fails)
    folder = write_repa_e(tmp_path / "REPA-E")
    arguments = ["peers", f"--repa_e={folder}", "--threads=1", "--iterations=1", "--repeats=1", f"--out={tmp_path}"]
    assert bench_main.main(arguments) == 0
    (row,) = json.loads(next(tmp_path.glob("peers_*.json")).read_text())
    assert list(row["columns"]) == ["as shipped"]
    assert row["left_out"] == {COMPILED: "InternalTorchDynamoError: no graph of this"}
    assert f"tiny: no column '{COMPILED}', torch {torch.__version__} fails at it: Internal" in table.peers_tables(
        tmp_path
    )
    at = "shipped"  # without it there is nothing to compare with
    with pytest.raises(InternalTorchDynamoError):
        bench_main.main(arguments)


def test_a_columns_time_is_the_median_of_its_processes():
    runs = [{"median_us": us, "peak_bytes": peak} for us, peak in ((30.0, 5), (10.0, 7), (20.0, 6))]
    column = Column("ours", "bf16", ours=True)
    entry = peers.column_entry(REPA_E, column, {"ours": Difference(0.0, 0.0, 0.0, ("loss", "a"))}, runs)
    assert (entry["least_us"], entry["median_us"], entry["most_us"], entry["peak_bytes"]) == (10.0, 20.0, 30.0, 7)
    assert entry["img_per_s"] == pytest.approx(2e6 / 20)


@pytest.mark.parametrize(("peer", "write", "case"), [
    ("REPA-E", write_repa_e, REPA_E), ("LightningDiT", write_lightningdit, LIGHTNINGDIT),
], ids=["REPA-E", "LightningDiT"])  # fmt: skip
def test_the_same_step_is_the_same_to_rounding(here, tmp_path, peer, write, case):
    """Also with LightningDiT's time, which runs the other way, and a half of the labels dropped."""
    found = difference_of_ours(peer, write(tmp_path), case)
    assert found.loss < 1e-6 and found.gradient < 1e-5 and found.parameter < 1e-5


@pytest.mark.parametrize(("wrong", "what"), [
    ({"factor": 1.01}, "loss 'velocity' differs by|loss 'loss' differs by"),
    ({"features": "(features.detach() + 0 * features)"}, "the gradient as a whole differs by"),  # as diffusers' LPIPS
], ids=["loss", "gradient"])  # fmt: skip
def test_another_step_is_refused_before_anything_is_timed(here, tmp_path, monkeypatch, capsys, wrong, what):
    monkeypatch.setattr(peers, "step_times", lambda *_: pytest.fail("it was timed"))
    folder = write_repa_e(tmp_path / "REPA-E", **wrong)
    assert bench_main.main(["peers", f"--repa_e={folder}", f"--out={tmp_path}", "--threads=1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: tiny, batch 2: 'ours in float32' does not compute the peer's step: ")
    assert any(part in message for part in what.split("|")) and message.endswith("nothing was timed\n")
    assert not list(tmp_path.glob("peers_*.json"))


def test_autoencoder_of_diffusers_is_ours(here, monkeypatch, tmp_path):
    """diffusers' own network; accelerate, of which tests have none, is a stand-in."""
    stand_in = repa_e.open_checkout(write_repa_e(tmp_path)).module("stand_in", "Accelerator")
    packages = {"accelerate": stand_in, "diffusers": diffusers}
    monkeypatch.setattr(autoencoder_kl, "_package", packages.__getitem__)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = dict(block_out_channels=[32, 64, 128, 128], layers_per_block=1, latent_channels=4, **blocks)
    case = autoencoder_kl._case("tiny", autoencoder_kl.EQUAL, sizes, 32, 32, 2)
    case.ours.settings["autoencoder"]["num_res_blocks"] = 1
    found = difference_of_ours("diffusers", peers.NO_FOLDER, case)
    assert found.loss < 1e-5 and found.gradient < 1e-4 and found.parameter < 1e-3


def test_bounds_of_a_first_step():
    truth = FirstStep({"loss": 2.0, "gan": 1e-6}, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1e-6])})
    close = FirstStep(
        {"loss": 2.0001, "gan": 9e-5, "more": 1.0}, {"a": torch.tensor([3.0, 4.001]), "b": torch.zeros(1)}
    )
    found = check(REPA_E, OURS_IN_FP32, close, truth, BOUNDS["fp32"])
    assert found.loss == pytest.approx(5e-5, rel=0.02) and found.where == ("loss", "a")
    assert found.gradient == pytest.approx(2e-4, rel=1e-3) and found.parameter == pytest.approx(2e-4, rel=1e-3)
    for wrong, what in [
        (FirstStep({**truth.losses, "gan": 1e-3}, truth.gradients), "loss 'gan' differs"),
        (FirstStep({**truth.losses, "loss": float("nan")}, truth.gradients), "loss 'loss' differs by nan"),
        (FirstStep(truth.losses, {**truth.gradients, "a": torch.tensor([3.0, 4.01])}), "gradient as a whole differs"),
        (FirstStep(truth.losses, {**truth.gradients, "b": torch.tensor([6e-4])}), "the gradient of b differs"),
        (FirstStep(truth.losses, {"a": truth.gradients["a"]}), "only one of both has a gradient of b"),
        (FirstStep({"loss": 2.0}, truth.gradients), "there is no loss gan"),
    ]:
        with pytest.raises(UserError, match=what):
            check(REPA_E, OURS_IN_FP32, wrong, truth, BOUNDS["fp32"])


def test_gradients_may_differ_by_what_rounding_does_to_the_peers_own():
    def own(gradient):
        return Difference(1.0, gradient, 2 * gradient, ("loss", "a"))

    assert bounds_of(OURS_IN_FP32, own(1e-7)) == BOUNDS["fp32"]
    assert bounds_of(OURS_IN_FP32, own(4e-3)) == pytest.approx((1e-4, 1.2e-2, 2.4e-2))  # the losses' stays
    assert bounds_of(ROUNDED, None) == CAPS["fp32"] and bounds_of(HALF, None) == CAPS["bf16"]


def test_what_only_the_peer_trains_is_refused():
    truth = FirstStep({"loss": 2.0}, {"a": torch.ones(2), "theirs": torch.ones(2)})
    ours = FirstStep({"loss": 2.0}, {"a": torch.ones(2)})
    with pytest.raises(UserError, match="only one of both has a gradient of theirs"):
        check(REPA_E, OURS_IN_FP32, ours, truth, BOUNDS["fp32"])


def test_what_is_never_equal_mathematics_has_the_same_losses_alone():
    as_run = autoencoder_kl.cases(CPU)[1]
    assert not as_run.equal and "not equal mathematics" in as_run.remark
    truth = FirstStep({"loss": 2.0}, {"a": torch.ones(2)})
    other = FirstStep({"loss": 2.0}, {"a": 2 * torch.ones(2)})
    assert check(as_run, OURS_IN_FP32, other, truth, BOUNDS["fp32"]).gradient == pytest.approx(1.0)
    with pytest.raises(UserError, match="gradient as a whole"):  # a peer's own columns are held to both
        check(as_run, Column("as shipped", "fp32"), other, truth, BOUNDS["fp32"])
    with pytest.raises(UserError, match="loss 'loss'"):
        check(as_run, OURS_IN_FP32, FirstStep({"loss": 2.1}, truth.gradients), truth, BOUNDS["fp32"])


def test_columns():
    names = [column.name for column in columns_of("fp16", True, CPU)]
    assert names == ["as shipped", "with TF32, channels-last, fused AdamW", "ours", "ours, compiled"]
    assert [column.precision for column in columns_of("fp16", True, CPU)] == ["fp32"] * 4
    cuda = [column.precision for column in columns_of("fp16", True, torch.device("cuda"))]
    assert cuda == ["fp16", "bf16", "bf16", "bf16"]
    assert columns_of("bf16", False, CPU)[2].name == "and torch.compile"


def test_a_column_without_compilation_keeps_a_peers_own_decorators_out(here):
    calls = []

    def count(module, inputs):
        calls.append(module)
        return module.forward

    @torch.compile(backend=count)
    def compiled(x):
        return x + 1

    for column, expected in ((TRUTH, 0), (Column("as shipped", "fp32", compile="shipped"), 1)):
        with Unit("REPA-E", Path(), REPA_E, column, "cpu", 1).stance():
            assert compiled(torch.ones(2)).sum() == 4
        assert len(calls) == expected


@pytest.mark.parametrize(("files", "line"), [
    (None, "error: --repa_e={folder}: there is no such folder; give the folder of a checkout of REPA-E"),
    ({}, "error: --repa_e={folder} is no checkout of REPA-E: it has no train_ldm_only.py"),
    (
        {"train_ldm_only.py": "import a_package_that_nobody_has.part"},
        (
            "error: REPA-E's code needs the package a_package_that_nobody_has, which is not installed: "
            "pip install a_package_that_nobody_has"
        ),
    ),
    (
        {"train_ldm_only.py": "from models.sit import SiT"},
        "error: {folder} is not the checkout of REPA-E that is known here: its train_ldm_only has no parse_args",
    ),
    (
        {"train_ldm_only.py": "import models.gone"},
        "error: {folder} is not the checkout of REPA-E that is known here: No module named 'models.gone'",
    ),
    (
        {"train_ldm_only.py": "import torch; torch.no_such_function"},
        (
            "error: REPA-E's train_ldm_only cannot be imported with the packages installed here: AttributeError: "
            "module 'torch' has no attribute 'no_such_function'"
        ),
    ),
], ids=["folder", "files", "package", "name", "module", "version"])  # fmt: skip
def test_what_is_missing_is_one_line(here, tmp_path, capsys, files, line):
    folder = tmp_path / "REPA-E"
    if files:
        write_repa_e(folder)
    elif files is not None:
        folder.mkdir()
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    assert bench_main.main(["peers", f"--repa_e={folder}", "--check", "--threads=1"]) == 2
    assert capsys.readouterr().err == line.format(folder=folder) + "\n"


def test_no_peer_is_a_line(capsys):
    assert bench_main.main(["peers"]) == 2
    assert "name a peer: --repa_e=CHECKOUT" in capsys.readouterr().err


def test_what_goes_to_a_process_and_comes_back(tmp_path):
    """A process is given a unit, and gives numbers or the line of an error."""
    unit = Unit("REPA-E", tmp_path, repa_e.cases(CPU)[0], TRUTH, "cpu", 1)
    assert pickle.loads(pickle.dumps(unit)) == unit
    with pytest.raises(UserError, match="there is no such folder") as raised:
        repa_e.open_checkout(tmp_path / "nowhere")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
