"""README's table of the demo, made from demos' folders."""

import json

import pytest
from scipy.stats import ttest_rel

from bench import demo
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import Result, append_results

SETTINGS = {
    "run": "somewhere", "vae_steps": 1000, "finetune_steps": 20, "generator_steps": 30,
    "generate": {"num_samples": 2000},
}  # fmt: skip
F1 = {"plain": (0.5, 0.51), "control": (0.52, 0.55), "send": (0.58, 0.57)}
"""By variant: of seed 0 and 1."""


def finished_demo(folder, seed, **changes):
    content = {"settings": SETTINGS | {"seed": seed}, "environment": {"git_commit": "0123456789"}, **changes}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
    for key, values in F1.items():
        numbers = dict.fromkeys(demo.METRICS, 10.0) | {"attribute_f1": values[seed]}
        results = [
            Result(metric=metric, value=value, interval=(value - 0.01, value + 0.01), protocol="p")
            for metric, value in numbers.items()
        ]
        append_results(folder / key / "evaluation.jsonl", results)
    return str(folder)


@pytest.fixture
def where(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{demo.BEGIN}\n{demo.END}\nafter\n")
    return ["--page", str(page), "--results", str(tmp_path / "demo.json")]


def test_one_seed_has_its_intervals_and_two_have_a_difference(tmp_path, where, capsys):
    page = tmp_path / "README.md"
    assert demo.main([finished_demo(tmp_path / "a", 0), *where]) == 0
    assert "| attribute F1 | 0.500 [0.490, 0.510] | 0.520 [0.510, 0.530] | 0.580 [0.570, 0.590] |" in page.read_text()
    assert "Seed 0; " in page.read_text() and "Commit 0123456; 1,000 steps of the plain VAE" in page.read_text()
    assert demo.main([finished_demo(tmp_path / "b", 1), *where]) == 0
    expected = ttest_rel(F1["send"], F1["control"]).confidence_interval()
    row = f"| attribute F1 | 0.505 | 0.535 | 0.575 | +0.040 [{expected.low:+.3f}, {expected.high:+.3f}] |"
    assert row in page.read_text()
    again = page.read_text()
    assert demo.main([str(tmp_path / "a"), *where]) == 0 and page.read_text() == again, "a demo counts once"
    assert again.startswith("before") and again.endswith("after\n")


def test_an_unfinished_demo_is_refused(tmp_path, where):
    folder = finished_demo(tmp_path / "a", 0, progress={})
    with pytest.raises(UserError, match="is not finished"):
        demo.main([folder, *where])


def test_readme_has_what_the_results_say():
    rows = json.loads(demo.RESULTS.read_text()) if demo.RESULTS.is_file() else []
    page = demo.PAGE.read_text(encoding="utf-8")
    assert not rows or demo.with_tables(page, demo.text(rows), demo.BEGIN, demo.END) == page, (
        "run `python -m bench demo`"
    )
