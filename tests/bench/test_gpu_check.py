"""What gpu-check does around its parts; the parts themselves need a GPU."""

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from op_cases import ALL
from time_limits import HANG_S

from bench import gpu_check
from bench.parts import FAILED, PASSED, SKIPPED, Part, Runner, table

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
    assert part.detail == "stopped after 1 s"
    part, _ = runner.run("late", [PYTHON, "-c", "pass"], 50)
    assert (part.outcome, part.detail) == (FAILED, "not run: the time for all parts was up")


def test_rows_of_a_test_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text("""<testsuites><testsuite>
        <testcase classname="tests.gpu.test_a" time="1.5"/><testcase classname="tests.gpu.test_a" time="1"/>
        <testcase classname="tests.gpu.test_a"><skipped/></testcase>
        <testcase classname="tests.gpu.test_b"><failure/></testcase><testcase classname="tests.gpu.test_b"/>
        <testcase classname="tests.gpu.test_c"><skipped/></testcase></testsuite></testsuites>""")
    a, b, c = gpu_check.rows_of_report(report)
    assert (a.name, a.outcome, a.seconds, a.detail) == ("test_a", PASSED, 2.5, "2 passed, 1 skipped")
    assert (b.outcome, c.outcome) == (FAILED, FAILED)  # all skipped is no pass


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
def test_sanitizer(runner, tmp_path, monkeypatch, output, code, outcome, detail):
    fake_sanitizer(tmp_path, output, code)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    part = gpu_check.sanitize(runner, "memcheck")
    assert (part.outcome, part.detail) == (outcome, detail)


def test_missing_sanitizer_is_said_and_no_failure(runner, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    part = gpu_check.sanitize(runner, "racecheck")
    assert (part.outcome, part.detail) == (SKIPPED, "compute-sanitizer is not installed")


def test_rows_of_the_benchmark():
    timing = {"median_us": 100.0, "q1_us": 99.0, "q3_us": 101.0}
    forms = {name: {**timing, "graph": timing} for name in ("eager", "torch.compile", "cuda", "copy")}
    row = {"op": "anything", "case": "", "pass": "forward", "device": "cuda", "chosen": "cuda", "forms": forms}
    failed = {"op": "other", "case": "", "pass": "", "error": "its process ended with exit code -11"}
    good, bad = gpu_check.bench_ops([row, failed])
    assert (good.name, good.outcome, good.detail) == ("bench anything", PASSED, "1 of 1 goals met")
    assert (bad.outcome, bad.detail) == (FAILED, "0 of 0 goals met; its process ended with exit code -11")


def test_table():
    text = table([Part("build", PASSED, 12.34), Part("tests", FAILED, 1.0, "exit code 3")])
    assert text == "  build  passed     12.3 s\n  tests  FAILED      1.0 s  exit code 3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_part_has_a_limit_and_all_fit_ten_minutes():
    assert set(gpu_check.LIMITS_S) == {"install", *gpu_check.PARTS}
    assert gpu_check.ALL_S < 600


def test_program_under_the_sanitizer_imports():
    """It runs on a GPU only; that it is importable and finds the cases is seen here."""
    path = Path(__file__).parents[1] / "gpu" / "call_every_kernel.py"
    spec = importlib.util.spec_from_file_location("call_every_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ALL is ALL
