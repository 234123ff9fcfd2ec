"""What gpu-check does around its parts; the parts themselves need a GPU."""

import importlib.util
import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.chosen import CHOSEN
from op_cases import ALL
from op_cases.common import Example
from time_limits import HANG_S

from bench import gpu_check, gpu_parts
from bench.gpu_parts import Place
from bench.kernel_cases import available_ops
from bench.machine import ROOT
from bench.parts import FAILED, LEFT, PASSED, SKIPPED, Part, Runner, table
from bench.sampling import CASES
from bench.step_cases import cases_of
from sendvae_fast.ops import dispatch

pytestmark = pytest.mark.slow

PYTHON = sys.executable


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path / "gpu_check.log", seconds=60)


def test_output_goes_to_the_log_and_only_this_commands_output_comes_back(runner):
    first, _ = runner.run("first", [PYTHON, "-c", "print('one')"], 30)
    second, output = runner.run("second", [PYTHON, "-c", "import os; print(os.environ['WORD'])"], 30, {"WORD": "two"})
    assert (first.outcome, second.outcome, output) == (PASSED, PASSED, "two\n")
    log = runner.log.read_text()
    assert "one" in log and "two" in log and "== second" in log


def test_failing_part_says_its_exit_code_and_its_last_lines(runner, capsys):
    part, _ = runner.run("part", [PYTHON, "-c", "print('why'); raise SystemExit(3)"], 30)
    assert (part.outcome, part.detail) == (FAILED, "exit code 3")
    assert "why" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_hanging_part_is_stopped_with_its_children(runner, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.parts.KILL_AFTER_S", 0.3)
    script = tmp_path / "hang.sh"
    script.write_text(f"trap '' INT\nsleep 1000 &\necho $! > {tmp_path}/child\nsleep 1000\n")
    part, _ = runner.run("part", ["bash", str(script)], 2)
    assert (part.outcome, part.detail) == (FAILED, "stopped after 2 s")
    child = Path("/proc", (tmp_path / "child").read_text().strip())
    deadline = time.monotonic() + HANG_S
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists() or "Z" in (child / "stat").read_text().split()[2]


def test_no_part_outlasts_the_time_of_all(tmp_path):
    runner = Runner(tmp_path / "log", seconds=1)
    part, _ = runner.run("long", [PYTHON, "-c", "import time; time.sleep(100)"], 50)
    assert (part.outcome, part.detail) == (LEFT, "stopped after 1 s")
    part, _ = runner.run("late", [PYTHON, "-c", "pass"], 50)
    assert (part.outcome, part.seconds) == (LEFT, 0.0)


@pytest.fixture
def place(runner, tmp_path):
    return Place(runner, tmp_path, tmp_path, "a_gpu")


@pytest.mark.parametrize(
    ("cases", "code", "outcome", "detail"),
    [
        (["", "", "<skipped/>"], 0, PASSED, "2 passed, 1 skipped"),
        (["", "<failure/>", "<error/>"], 1, FAILED, "exit code 1; 1 error, 1 failure, 1 passed; test_1; test_2"),
        (["<skipped/>"], 0, FAILED, "1 skipped"),  # all skipped is no pass
        (None, 2, FAILED, "exit code 2; no report"),
    ],
)
def test_a_test_run_is_summed_up(place, monkeypatch, cases, code, outcome, detail):
    def run(self, name, command, limit_s, environment):
        (report,) = (Path(word.partition("=")[2]) for word in command if word.startswith("--junitxml="))
        if cases is not None:
            text = "".join(f'<testcase name="test_{i}">{result}</testcase>' for i, result in enumerate(cases))
            report.write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
        return Part(name, FAILED if code else PASSED, detail=f"exit code {code}" if code else ""), ""

    monkeypatch.setattr(Runner, "run", run)
    part = gpu_parts.tests(place, "tests", 50, ("tests/gpu",))
    assert (part.outcome, part.detail) == (outcome, detail)


def fake_sanitizer(folder: Path, output: str, code: int) -> None:
    program = folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("output", "code", "outcome", "detail"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, PASSED, "ERROR SUMMARY: 0 errors"),
        ("========= ERROR SUMMARY: 2 errors", 99, FAILED, "exit code 99; ERROR SUMMARY: 2 errors"),
        ("Traceback", 1, FAILED, "exit code 1"),
        ("========= Error: Device not supported", 1, SKIPPED, "compute-sanitizer does not support this device here"),
    ],
)
def test_sanitizer(place, tmp_path, monkeypatch, output, code, outcome, detail):
    fake_sanitizer(tmp_path, output, code)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    part = gpu_parts.sanitize(place, "memcheck", 50)
    assert (part.outcome, part.detail) == (outcome, detail)


def test_missing_sanitizer_is_said_and_no_failure(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    part = gpu_parts.sanitize(place, "racecheck", 50)
    assert (part.outcome, part.detail) == (SKIPPED, "compute-sanitizer is not installed")


def test_rows_of_the_benchmark(place, monkeypatch):
    timing = {"median_us": 100.0, "q1_us": 99.0, "q3_us": 101.0}
    forms = {name: {**timing, "graph": timing} for name in ("eager", "torch.compile", "cuda", "copy")}
    row = {
        "op": "anything",
        "case": "",
        "pass": "forward",
        "device": "cuda",
        "chosen": "cuda",
        "bytes": 8,
        "forms": forms,
    }
    failed = {"op": "other", "case": "", "pass": "", "error": "its process ended with exit code -11"}
    (place.out / "kernels_a_gpu.json").write_text(json.dumps([row, failed]))
    monkeypatch.setattr(Runner, "run", lambda self, name, *_: (Part(name, PASSED), ""))
    assert gpu_parts.kernels(place, "bench", 50, "anything").detail == "1 of 1 goals met"
    wrong = gpu_parts.kernels(place, "bench", 50, "other")
    assert wrong.detail == "0 of 0 goals met; its process ended with exit code -11"


def test_table():
    text = table([Part("build", PASSED, 12.34), Part("tests", FAILED, 1.0, "exit code 3")])
    assert text == "  build  passed     12.3 s\n  tests  FAILED      1.0 s  exit code 3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


class Clock:
    """A runner of whom only the time is asked."""

    def __init__(self, seconds):
        self.remaining_s = seconds


FACTS = {"versions": {"torch": "2.11"}, "commit": "abc", "machine": {"name": "a GPU"}}


def call(folder, items, seconds=gpu_check.ALL_S, facts=FACTS):
    """One call of gpu-check, as `main` makes it; the outcomes so far."""
    record = gpu_check.Record(folder / "gpu_check_a_gpu.json", facts)
    gpu_check.work_through(items, record, Place(Clock(seconds), folder, folder, "a_gpu"))
    return {name: part.outcome for name, part in record.parts.items()}


def stand_in(name, seconds, ran, outcomes=(PASSED,), limit_s=None):
    """An item that takes so long; its outcomes from call to call."""
    outcomes = list(outcomes)

    def run(place, name, limit_s):
        ran.append(name)
        place.runner.remaining_s -= seconds
        return Part(name, outcomes.pop(0) if len(outcomes) > 1 else outcomes[0], seconds, facts={"rate": 1.5})

    return gpu_check.Item("step", name, limit_s or 1.5 * seconds, run)


def test_a_second_and_a_third_call_go_on_where_the_first_stopped(tmp_path):
    ran = []
    items = [
        stand_in("one", 300, ran), stand_in("broken", 100, ran, [FAILED, PASSED]), stand_in("long", 400, ran),
        stand_in("short", 60, ran), stand_in("last", 200, ran),
    ]  # fmt: skip
    first = call(tmp_path, items)
    # What is too long for the rest of the time is left, what is short enough is done before it.
    assert ran == ["one", "broken", "short"]
    assert first == {"one": PASSED, "broken": FAILED, "long": LEFT, "short": PASSED, "last": LEFT}
    ran.clear()
    assert call(tmp_path, items, facts={**FACTS, "commit": "def"})["long"] == PASSED
    assert ran == ["long", "broken"]  # the failed one after what was never reached; "last" does not fit any more
    ran.clear()
    assert set(call(tmp_path, items).values()) == {PASSED} and ran == ["last"]
    ran.clear()
    assert set(call(tmp_path, items).values()) == {PASSED} and ran == []
    kept = {part["name"]: part for part in json.loads((tmp_path / "gpu_check_a_gpu.json").read_text())["parts"]}
    assert (kept["one"]["commit"], kept["long"]["commit"], kept["long"]["facts"]) == ("abc", "def", {"rate": 1.5})
    other = {**FACTS, "versions": {"torch": "2.12"}}
    assert call(tmp_path, items, facts=other)["one"] == PASSED and ran[0] == "one"  # another torch: all again


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """Twice, into a folder that is empty each time; what came back of the first call lies in bench/results by then."""
    ran, results = [], tmp_path / "results"
    results.mkdir()
    items = (stand_in("first", 0, ran, limit_s=1), stand_in("second", 0, ran, [FAILED, PASSED], limit_s=1))
    facts = {"name": "A GPU", "capability": "90"}
    monkeypatch.setattr(gpu_check, "ITEMS", items)
    monkeypatch.setattr(gpu_check, "RESULTS", results)
    monkeypatch.setattr(gpu_check, "machine_facts", lambda device: facts)
    monkeypatch.setattr(gpu_parts, "build", lambda runner, limit_s: ran.append("build") or Part("build", PASSED))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "Runner", lambda log, seconds: Clock(seconds))
    assert gpu_check.main(["--out", str(tmp_path / "first")]) == 1
    assert ran == ["build", "first", "second"] and "FAILED" in capsys.readouterr().out
    (tmp_path / "first" / "gpu_check_a_gpu.json").rename(results / "gpu_check_a_gpu.json")
    ran.clear()
    assert gpu_check.main(["--out", str(tmp_path / "second")]) == 0
    assert ran == ["build", "second"] and "A GPU (sm_90), commit" in capsys.readouterr().out
    kept = json.loads((tmp_path / "second" / "gpu_check_a_gpu.json").read_text())
    assert {part["name"]: part["outcome"] for part in kept["parts"]} == dict.fromkeys(
        ("build", "first", "second"), PASSED
    )
    assert kept["machine"] == facts
    ran.clear()
    assert gpu_check.main(["--out", str(tmp_path / "second"), "--again", "--parts", "step"]) == 0
    assert ran == ["first", "second"]
    assert "build" in (tmp_path / "second" / "gpu_check_a_gpu.json").read_text()


def test_a_call_that_is_killed_keeps_what_it_had_done(tmp_path):
    ran = []

    def killed(place, name, limit_s):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, [stand_in("one", 10, ran), gpu_check.Item("step", "two", 10, killed)])
    assert call(tmp_path, [stand_in("one", 10, ran), stand_in("two", 10, ran)]) == {"one": PASSED, "two": PASSED}
    assert ran == ["one", "two"]


def test_every_part_begins_within_one_call_and_three_calls_reach_all():
    """By the limits, which are above what the parts take: each call does the build again."""
    names = [item.name for item in gpu_check.ITEMS]
    assert len(set(names)) == len(names) and gpu_check.ALL_S < 600
    for item in gpu_check.ITEMS:
        assert gpu_check.WORTH_STARTING * item.limit_s < gpu_check.ALL_S - gpu_check.BUILD_S
    assert gpu_check.PARTS == ("build", "attention", "step", "sampling", "bench", "tests", "sanitizers", "demo")


def test_results_of_earlier_calls_are_brought_along(tmp_path, monkeypatch):
    results, out = tmp_path / "results", tmp_path / "out"
    (results / "sendvae_fast").mkdir(parents=True)
    kept = ["kernels_a_gpu.json", "sendvae_fast/attention-a-gpu-1.json"]
    for name in (*kept, "kernels_other.json"):
        (results / name).write_text(f"[{len(name)}]")
    monkeypatch.setattr(gpu_check, "RESULTS", results)
    gpu_check.bring_results("a_gpu", out)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.json")) == kept
    (out / kept[0]).write_text("newer")
    gpu_check.bring_results("a_gpu", out)
    assert (out / kept[0]).read_text() == "newer"


@pytest.mark.parametrize(("capability", "wanted"), [((9, 0), "90a-real"), ((8, 6), "86-real"), ((12, 0), "120a-real")])
def test_it_builds_for_this_gpu_alone(runner, monkeypatch, capability, wanted):
    seen = {}

    def run(self, name, command, limit_s, environment):
        seen.update(environment)
        return Part(name, PASSED), ""

    monkeypatch.delenv("SENDVAE_CUDA_ARCHITECTURES", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(Runner, "run", run)
    gpu_parts.build(runner, 9)
    assert seen == {"SENDVAE_BUILD": "require", "SENDVAE_BUILD_CUDA": "1", "SENDVAE_CUDA_ARCHITECTURES": wanted}


def test_attention_is_tuned_once_for_all_calls(runner, tmp_path, monkeypatch):
    """Its table goes to the results, but not what other packages keep in a cache directory."""
    places = [Place(runner, tmp_path / "out", tmp_path / name, "a_gpu") for name in ("first", "second")]

    def tune(self, name, command, limit_s, environment):
        for file in ("sendvae_fast/attention.json", "matplotlib/fonts.json"):
            path = Path(environment["XDG_CACHE_HOME"], file)
            path.parent.mkdir(parents=True)
            path.write_text("{}")
        return Part(name, PASSED), "Measurement(a)\nMeasurement(b)\n"

    monkeypatch.setattr(Runner, "run", tune)
    places[0].copy_tables(back=False)
    assert gpu_parts.tune_attention(places[0], "attention", 9).detail == "2 shapes"
    assert [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.json")] == [
        "sendvae_fast/attention.json"
    ]
    places[1].copy_tables(back=False)
    assert (places[1].cache / "sendvae_fast" / "attention.json").exists()


def test_the_cases_named_are_cases_on_a_gpu():
    gpu = torch.device("cuda")
    assert {gpu_check.XL, gpu_check.VAE} <= {case.label for stage in ("sit", "vae") for case in cases_of(stage, gpu)}
    assert gpu_check.DRAW in {case.name for case in CASES["cuda"]}
    names = {item.name.removeprefix("bench ") for item in gpu_check.ITEMS if item.part == "bench"}
    assert names == set(available_ops())
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    tested = {word for item in gpu_check.ITEMS if item.part == "tests" for word in item.run.keywords["arguments"]}
    assert files <= tested


def test_program_under_the_sanitizer_calls_every_path(monkeypatch):
    """It runs on a GPU only; that it makes all the calls that reach every path of the kernels is seen here."""
    path = Path(__file__).parents[1] / "gpu" / "call_every_kernel.py"
    spec = importlib.util.spec_from_file_location("call_every_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    called = {tests.op: set() for tests in ALL if "cuda" in dispatch.OPS[tests.op]}
    monkeypatch.setattr(module, "ALL", [
        replace(
            tests, raw_calls=lambda *_: [], example=lambda *_: Example(lambda: (), ()),
            check=lambda case, dtype, *_, op=tests.op: called[op].add(str(case)),
        )
        for tests in ALL
    ])  # fmt: skip
    monkeypatch.setattr(module, "use_backend", lambda name: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    module.main()
    assert called == {op: set(cases) for op, cases in CHOSEN.items()}
