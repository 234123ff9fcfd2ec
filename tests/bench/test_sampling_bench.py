"""The sampling benchmark's forms draw the same latents, and it says so when one does not."""

import json
import re

import pytest
import torch

from bench import gpu_parts, sampling, table, timing
from bench.parts import FAILED, PASSED, Part

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(monkeypatch):
    cases = tuple(sampling.SamplingCase("SiT-S/2", precision, 2, 2, latent=(4, 4)) for precision in ("bf16", "fp32"))
    monkeypatch.setattr(sampling, "CASES", {"cpu": cases})
    monkeypatch.setattr(sampling, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "WARMUP_CALLS", 1)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)
    monkeypatch.setattr(sampling.Bench, "forms", without_compiling(sampling.Bench.forms))
    threads = torch.get_num_threads()
    yield cases
    torch.set_num_threads(threads)


def without_compiling(forms):
    return lambda bench, *, compile: forms(bench, compile=False)


def test_rows_and_their_table(tiny, tmp_path, capsys):
    options = ["--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert sampling.main(options) == 0
    assert sampling.main([*options, "--quick"]) == 0
    (file,) = tmp_path.glob("sampling_*.json")
    rows = {row["case"]: row for row in json.loads(file.read_text())}
    assert set(rows) == {"SiT-S/2, bf16, batch 2", "SiT-S/2, fp32, batch 2"}  # the other case stays
    for row in rows.values():
        assert set(row["forms"]) == {"eager", "ours"}
        for result in row["forms"].values():
            assert 0 < result["q1_ms"] <= result["step_ms"] <= result["q3_ms"]
            assert result["img_per_s"] == pytest.approx(2 / 250 / result["step_ms"] * 1e3)
    assert 1e-4 < rows["SiT-S/2, bf16, batch 2"]["forms"]["ours"]["error"] < 2e-2
    assert rows["SiT-S/2, fp32, batch 2"]["forms"]["ours"]["error"] < 1e-5
    text = table.sampling_tables(tmp_path)
    assert re.search(r"\| SiT-S/2, bf16, batch 2 \| ours \| .*x \|  \| \S+ \| \S+: \d\.\d\dx eager \(goal 1.3x\)", text)


as_scale = pytest.mark.repeats(
    "bench/test_sampling_bench.py::test_a_form_that_draws_other_latents_is_a_failure_and_not_timed"
)


@pytest.mark.parametrize("wrong", [
    "SCALE", pytest.param("NUM_CLASSES", marks=as_scale), pytest.param("noise", marks=as_scale)
])  # fmt: skip
def test_a_form_that_draws_other_latents_is_a_failure_and_not_timed(tiny, tmp_path, monkeypatch, capsys, wrong):
    if wrong == "SCALE":
        reference = sampling.reference_sampler
        wrong_scale = {"guidance_scale": 2.0}
        monkeypatch.setattr(sampling, "reference_sampler", lambda *args, **kw: reference(*args, **kw | wrong_scale))
    elif wrong == "NUM_CLASSES":
        monkeypatch.setattr(sampling, "sample_labels", lambda *_: torch.tensor([0, 1]))
    else:
        monkeypatch.setattr(sampling.Bench, "noise", lambda self, step: torch.zeros(2, *self.shape))
    assert sampling.main(["--device", "cpu", "--threads", "1", "--out", str(tmp_path), "--quick"]) == 1
    assert "FAILED latents are not the eager sampler's: error ours" in capsys.readouterr().out
    (file,) = tmp_path.glob("sampling_*.json")
    assert "step_ms" not in file.read_text()
    assert "Failed: SiT-S/2, bf16, batch 2" in table.sampling_tables(tmp_path)


def test_the_part_of_gpu_check_shows_goals_and_failures(tmp_path):
    class Runner:
        def run(self, name, command, limit_s, environment):
            assert command[3:5] == ["sampling", "--quick"] and environment["XDG_CACHE_HOME"] == str(tmp_path / "cache")
            return Part(name, self.outcome, 3.0), self.output

    runner = Runner()
    place = gpu_parts.Place(runner, tmp_path, tmp_path, "a_gpu")
    runner.outcome = PASSED
    runner.output = "SiT-XL/1\n  eager: error 1e-3, 40 ms a step\n  met: 1.62x eager (goal 1.5x)\nwritten: x\n"
    assert gpu_parts.measure(place, "a", 9, ("sampling", "--quick")).detail == "met: 1.62x eager (goal 1.5x)"
    runner.outcome, runner.output = FAILED, "SiT-XL/1\n  FAILED latents with and without CUDA graphs are not the same\n"
    assert "CUDA graphs are not the same" in gpu_parts.measure(place, "a", 9, ("sampling", "--quick")).detail
