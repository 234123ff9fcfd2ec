"""The kernel benchmark on tiny cases: what it measures and reports, never how fast."""

import json
import os
import time
from operator import itemgetter

import pytest
import torch

from bench import __main__ as bench_main
from bench import kernels
from bench.host_cost import RECORDED, host_rows
from bench.kernel_cases import LIBRARY_OPS, available_ops, cases_of, nearly_empty_cases_of
from bench.kernel_cases.case import KernelCase, random_normal
from bench.kernel_rows import COPY, EAGER, EAGER_NCHW, FORWARD, WITH_BACKWARD, Effort, outputs_of, rows_of
from bench.result_file import write_rows
from sendvae_fast.ops.dispatch import OPS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
EFFORT = Effort(seconds=0.0, sample_s=0.0, compile=False)


def tiny_case(**changes) -> KernelCase:
    """cosine_align on 4 patches."""

    def inputs(number):
        pair = (random_normal(2, 4, 8, number=2 * number + i, dtype=torch.float32, device=CPU) for i in range(2))
        return tuple(x.requires_grad_() for x in pair)

    (real, *_) = cases_of("cosine_align", CPU)
    form = dict(
        name="tiny", inputs=inputs, eager=real.eager, fused=real.fused, forward_bytes=256, backward_bytes=512
    )  # fmt: skip
    return KernelCase(**{**form, **changes})


def rows(case: KernelCase, effort: Effort = EFFORT) -> list[dict]:
    return list(rows_of("cosine_align", case, CPU, 1024, effort))


def test_rows_hold_every_form_and_pass():
    forward, both = rows(tiny_case(yardsticks={"other": lambda f, y: (f * y).sum()}))
    assert (forward["pass"], both["pass"]) == ("forward", "forward+backward")
    assert (forward["bytes"], both["bytes"]) == (256, 768)
    for row in (forward, both):
        assert {EAGER, COPY, "other"} <= set(row["forms"]) and "triton" not in row["forms"]
        for result in row["forms"].values():
            assert 0 < result["q1_us"] <= result["median_us"] <= result["q3_us"]
            assert result["gb_per_s"] == pytest.approx(row["bytes"] / result["median_us"] / 1e3, abs=0.01, rel=0.01)
    assert len(rows(tiny_case(backward_bytes=None))) == 1


def test_eager_is_timed_in_nchw_too():
    """On contiguous copies, and with contiguous gradients, where the case's tensors are channels-last."""
    seen = set()

    def inputs(number):
        x = random_normal(2, 4, 3, 5, number=number, dtype=torch.float32, device=CPU)
        return (x.to(memory_format=torch.channels_last).requires_grad_(),)

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.add(("forward", x.is_contiguous()))
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.add(("backward", grad.is_contiguous()))
            return 2 * grad

    (_, row) = rows(tiny_case(inputs=inputs, eager=Double.apply, fused=lambda x: 2 * x, nchw=True))
    assert row["forms"][EAGER_NCHW]["median_us"] > 0
    assert seen == {(name, contiguous) for name in ("forward", "backward") for contiguous in (False, True)}


def test_compiled_form_is_timed_and_compared():
    (row,) = rows(tiny_case(backward_bytes=None), Effort(seconds=0.0, sample_s=0.0))
    assert row["forms"]["torch.compile"]["median_us"] > 0
    (row,) = rows(tiny_case(backward_bytes=None, compiles=False), Effort(seconds=0.0, sample_s=0.0))
    assert "torch.compile" not in row["forms"]
    other = tiny_case(backward_bytes=None, to_compile=lambda f, y: f + y)
    (row,) = rows(other, Effort(seconds=0.0, sample_s=0.0))
    assert row["forms"]["torch.compile"]["median_us"] > 0


def test_wrong_or_failing_forms_are_reported_and_stop_nothing():
    def raises(features, target):
        raise RuntimeError("no such\nluck")

    wrong = tiny_case(fused=lambda f, y: 1.1 * (f * y).sum().detach())
    fails = tiny_case(fused=raises, yardsticks={"also": raises})
    for row in rows(wrong):
        backends = {name: result for name, result in row["forms"].items() if name in ("cpu", "cuda")}
        assert backends and all("differs" in result["error"] for result in backends.values())
        assert row["forms"][EAGER]["median_us"] > 0
    for row in rows(fails):
        assert row["forms"]["also"] == {"error": "RuntimeError: no such luck"}
        assert kernels.errors_of(row) and "FAILED" in kernels.summary(row)
    for row in rows(tiny_case(eager=raises)):
        assert "no such luck" in row["error"] and "forms" not in row


def test_gradients_reach_the_leaves_through_views():
    seen = []

    def form(features, target):
        out = ((features[:, 1:] - target[:, 1:]) ** 2).sum()
        out.register_hook(seen.append) if out.requires_grad else None
        return out

    _, both = rows(tiny_case(eager=form, fused=form))
    assert "error" not in both and seen


def test_op_of_libraries_is_one_form():
    row, _ = rows_of("attention", tiny_case(), CPU, 1024, EFFORT)
    assert row["chosen"] == "attention" and set(row["forms"]) == {EAGER, "attention", COPY}


def test_every_op_has_cases():
    assert available_ops() == [*OPS, *LIBRARY_OPS]


@pytest.mark.parametrize("op", available_ops())
def test_cases_are_well_formed(op):
    cases = cases_of(op, CPU)
    assert cases and len({case.name for case in cases}) == len(cases)
    assert all(case.forward_bytes > 0 for case in cases)


@pytest.mark.parametrize("op", OPS)
def test_nearly_empty_cases_give_host_rows(op):
    """Every op; the forms agree, so that their calls are of the same work."""
    for case in nearly_empty_cases_of(op, CPU):
        outputs = [outputs_of(form, case.inputs(0)) for form in (case.eager, case.fused)]
        for eager, fused in zip(*outputs, strict=True):
            torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-4)
    rows = list(host_rows(op, CPU, rounds=1))
    assert {row["pass"] for row in rows} in ({FORWARD}, {FORWARD, RECORDED, WITH_BACKWARD})
    for row in rows:
        assert {EAGER, row["chosen"]} <= set(row["forms"])
        assert all(0 < times["min_us"] <= times["median_us"] for times in row["forms"].values())


def test_dead_process_is_a_row(monkeypatch):
    monkeypatch.setattr(kernels, "measure_op", _die)
    (row,) = kernels.measured_rows(["cosine_align"], CPU, 1, EFFORT)
    assert row["error"] == "its process ended with exit code 3"


def test_hanging_process_is_stopped_and_a_row(monkeypatch):
    monkeypatch.setattr(kernels, "measure_op", _hang)
    *_, last = kernels.measured_rows(["cosine_align"], CPU, 1, Effort(seconds=0.0, op_limit_s=3))
    assert last["error"] == "not done within 3 s"


def _die(*_):
    os._exit(3)


def _hang(*_):
    time.sleep(100)


def test_results_replace_only_the_ops_measured(tmp_path):
    write_rows(tmp_path, "kernels", "A (R) machine", [{"op": "a", "x": 1}, {"op": "b", "x": 1}], itemgetter("op"))
    path = write_rows(tmp_path, "kernels", "A (R) machine", [{"op": "a", "x": 2}], itemgetter("op"))
    assert path.name == "kernels_a_r_machine.json"
    assert json.loads(path.read_text()) == [{"op": "b", "x": 1}, {"op": "a", "x": 2}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernel"], "no verb 'kernel'; the verbs are kernels"),
        (["kernels", "--ops", "nothing"], "--ops: no cases of nothing; there are noise_inject"),
        (["kernels", "--threads", "0"], "must be a positive number, got '0'"),
        (["kernels", "--colour"], "unrecognized arguments: --colour"),
        pytest.param(
            ["kernels", "--device", "cuda"], "PyTorch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_line(arguments, words, capsys):
    assert bench_main.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_forced_backend_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("SENDVAE_BACKEND", "reference")
    assert bench_main.main(["kernels", "--quick"]) == 2
    assert "unset it" in capsys.readouterr().err


def test_whole_verb(tmp_path, monkeypatch, capsys):
    """One real case through its own process, into a file; rows carry what a timing depends on."""
    assert bench_main.main(["kernels", "--ops", "noise_inject", "--quick", "--device", "cpu", "--threads", "1",
                            "--out", str(tmp_path)]) == 0  # fmt: skip
    (path,) = tmp_path.glob("kernels_*.json")
    written = json.loads(path.read_text())
    assert {row["op"] for row in written} == {"noise_inject"} and len(written) == 3
    for row in written:
        assert row["threads"] == 1 and row["versions"]["torch"] == torch.__version__
        assert {"machine", "commit", "clean", "date"} <= set(row)
    assert "noise_inject" in capsys.readouterr().out
