"""The tables of docs/performance.md, made from results."""

import json

import pytest

from bench import goals, host_table, table
from bench.kernel_rows import COPY, EAGER, FORWARD, WITH_BACKWARD
from sendvae_fast.errors import UserError


def timing(median: float) -> dict:
    return {"median_us": median, "q1_us": 0.9 * median, "q3_us": 1.1 * median, "num_samples": 9}


def row(device: str = "cpu", **changes) -> dict:
    forms = {EAGER: timing(300.0), "torch.compile": timing(150.0), device: timing(100.0), COPY: timing(90.0)}
    if device == "cuda":
        forms = {name: {**result, "graph": timing(result["median_us"] / 2)} for name, result in forms.items()}
    return {
        "op": "cosine_align", "case": "tiny", "pass": FORWARD, "bytes": 9_000_000, "chosen": device, "forms": forms,
        "device": device, "machine": {"name": "Some CPU", "load_1min": 0.1}, "threads": 2, "commit": "0123456789abcdef",
        "clean": True, "date": "2026-01-02", "versions": {"torch": "2.15.0", "cuda": None}, **changes,
    }  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_numbers_of_a_row():
    head, _, body = table.table([row()], None)
    values = dict(zip(cells(head), cells(body), strict=True))
    assert values["eager"] == "300 µs ±10%" and values["cpu"] == "**100 µs ±10%**"
    assert (values["vs eager"], values["vs compile"], values["of copy"]) == ("3.00x", "1.50x", "90%")
    assert (values["GB/s"], values["copy GB/s"]) == ("90", "100")
    assert values["goals"] == "met: 3.00x eager (goal 1.5x)"
    assert "other" not in values and "triton" not in values


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0.1234, "0.123 µs"), (1.234, "1.23 µs"), (12.34, "12.3 µs"), (999.0, "999 µs"), (1234.0, "1.23 ms"),
     (123456.0, "123 ms"), (1234567.0, "1235 ms")],
)  # fmt: skip
def test_durations_have_three_digits(microseconds, text):
    assert table.duration(microseconds) == text


def test_goals_on_cuda_are_judged_by_graph_replays():
    one = row("cuda")
    one["forms"]["cuda"]["graph"] = timing(60.0)
    on_device, launched = table.machine_tables([one]).split("As launched from Python")
    assert "**60.0 µs" in on_device and "**missed**: 75% of copy (goal 90%)" in on_device
    assert "**100 µs" in launched and "goal" not in launched


def test_failures_are_listed_and_in_place():
    failed = row()
    failed["forms"]["cpu"] = {"error": "RuntimeError: no luck"}
    dead = {**row(), "case": "", "pass": "", "error": "its process ended with exit code 3"}
    del dead["forms"], dead["bytes"], dead["chosen"]
    text = table.machine_tables([failed, dead])
    assert "- cosine_align, tiny, forward: cpu: RuntimeError: no luck" in text
    assert "- cosine_align: its process ended with exit code 3" in text
    assert "| failed |" in text and "**missed**: no time eager (goal 1.5x)" in text


def test_every_commit_is_named():
    text = table.machine_tables([row(), row(commit="f" * 40, clean=False), row(commit=None, clean=None)])
    assert text.count("- commit") == 3
    assert "0123456789, 2026" in text and "ffffffffff with uncommitted changes" in text and "unknown (tree" in text


def test_only_the_text_between_the_markers_changes(tmp_path):
    page = tmp_path / "page.md"
    names = ("PREDICTED", "HOST", "DATA", "SAMPLING", "EVALUATION", "SAVING", "STEP", "PEERS")
    data = "\n".join(f"{getattr(table, f'{name}_BEGIN')}\nold\n{getattr(table, f'{name}_END')}" for name in names)
    page.write_text(f"above\n{table.BEGIN}\nold\n{table.END}\n{data}\nbelow\n")
    (tmp_path / "kernels_some_cpu.json").write_text(json.dumps([row()]))
    arguments = ["--page", str(page), "--results", str(tmp_path)]
    table.main(arguments)
    once = page.read_text()
    table.main(arguments)
    assert page.read_text() == once
    assert once.startswith("above\n") and once.endswith("below\n") and "old" not in once and "### Some CPU" in once
    with pytest.raises(UserError, match="markers|lines"):
        table.with_tables("no markers", "text")


def test_page_is_generated_from_the_results():
    """Nothing in the page's tables is typed: they are what the results in the repository give."""
    page = table.PAGE.read_text()
    assert page == table.with_tables(page, table.tables(table.RESULTS))
    predicted = table.predicted_tables(table.RESULTS)
    assert page == table.with_tables(page, predicted, table.PREDICTED_BEGIN, table.PREDICTED_END)
    assert page == table.with_tables(page, table.host_tables(table.RESULTS), table.HOST_BEGIN, table.HOST_END)
    assert page == table.with_tables(page, table.data_tables(table.RESULTS), table.DATA_BEGIN, table.DATA_END)
    sampling = table.sampling_tables(table.RESULTS)
    assert page == table.with_tables(page, sampling, table.SAMPLING_BEGIN, table.SAMPLING_END)
    evaluation = table.evaluation_tables(table.RESULTS)
    assert page == table.with_tables(page, evaluation, table.EVALUATION_BEGIN, table.EVALUATION_END)
    assert page == table.with_tables(page, table.step_tables(table.RESULTS), table.STEP_BEGIN, table.STEP_END)
    assert page == table.with_tables(page, table.peers_tables(table.RESULTS), table.PEERS_BEGIN, table.PEERS_END)


def test_an_op_without_a_goal_of_its_own_must_not_be_slower():
    (verdict,) = goals.verdicts(row(op="anything"), None)
    assert verdict.goal == goals.Goal(EAGER, 1.0) and verdict.met
    slow = row(op="anything", forms={EAGER: timing(90.0), "cpu": timing(100.0)})
    (verdict,) = goals.verdicts(slow, None)
    assert not verdict.met and str(verdict) == "**missed**: 0.90x eager (goal 1.0x)"


def test_host_times_are_judged_by_their_least():
    forms = {EAGER: {"min_us": 20.0, "median_us": 90.0}, "cpu": {"min_us": 25.0, "median_us": 26.0}}
    *_, other, forward = host_table.cells_of(row(forms=forms))
    assert other == "" and forward == "met: 30 µs or eager's"
    *cells, both = host_table.cells_of(row(forms=forms, **{"pass": WITH_BACKWARD}))
    assert cells[3:6] == ["20.0 µs (90.0)", "25.0 µs (26.0)", "1.25"] and both == "**missed**: 1.1x eager's"


def test_goals_are_of_known_devices_and_passes():
    for (_, device), wanted in goals.GOALS.items():
        assert device in ("cpu", "cuda") and wanted
        assert all(goal.at_least > 0 and set(goal.passes) <= {FORWARD, WITH_BACKWARD} for goal in wanted)
