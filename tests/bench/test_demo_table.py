"""README's table of methods, made from a comparison's folder."""

import json

import pytest
from scipy.stats import t, ttest_rel

from bench import demo
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import Result, append_results

DISTANCE = {"Control": (20.0, 22.0, 21.5), "Send-VAE": (15.0, 18.0, 13.0)}
"""By method: of seeds 0, 1 and 2."""


def finished(folder, seeds, **changes):
    folder.mkdir()
    variants = []
    for name, values in DISTANCE.items():
        files = [f"seed-{seed}/{name}/evaluation.jsonl" for seed in seeds]
        for seed, file in zip(seeds, files, strict=True):
            numbers = dict.fromkeys(demo.METRICS, 10.0) | {"frechet_judge": values[seed]}
            append_results(folder / file, [
                Result(metric=metric, value=value, interval=(value - 1, value + 1), protocol="p")
                for metric, value in numbers.items()
            ])  # fmt: skip
        variants.append({"name": name, "evaluations": files})
    content = {
        "variants": variants, "control": "Control", "subtitle": "6,000 rendered scenes",
        "notes": ["Control: 3 steps from Plain VAE, a generator of 4 steps.", "One seed is an anecdote."],
        "settings": {"seeds": seeds}, "environment": {"git_commit": "0123456789"},
    } | changes  # fmt: skip
    (folder / "results.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def where(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{demo.BEGIN}\n{demo.END}\nafter\n")
    return ["--page", str(page), "--results", str(tmp_path / "demo.json")]


def test_one_seed_has_its_intervals_over_pictures(tmp_path, where):
    assert demo.main([finished(tmp_path / "a", [0]), *where]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "| Send-VAE | 15.00 [14.00, 16.00] | 10.00 [9.00, 11.00] | 10.000 [9.000, 11.000] |" in page
    assert "minus Control" not in page and "nothing of other seeds. Commit 0123456; 6,000 rendered" in page
    assert "a generator of 4 steps." in page and "anecdote" not in page


def test_several_seeds_have_means_and_differences(tmp_path, where):
    assert demo.main([finished(tmp_path / "a", [0, 1, 2]), *where]) == 0
    page = (tmp_path / "README.md").read_text()
    pair = ttest_rel(DISTANCE["Send-VAE"], DISTANCE["Control"]).confidence_interval()
    half = t.ppf(0.975, 2) * 2.516611478 / 3**0.5  # the deviation of 15, 18, 13
    assert (
        f"| Send-VAE | 15.33 [{46 / 3 - half:.2f}, {46 / 3 + half:.2f}] | -5.83 [{pair.low:+.2f}, {pair.high:+.2f}] | "
        in page
    )
    assert "| Control | 21.17 [" in page and "] |  | 10.00 [10.00, 10.00] |" in page
    assert page.startswith("before") and page.endswith("after\n")
    assert demo.main(where) == 0 and (tmp_path / "README.md").read_text() == page, "made again from the results"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"progress": {}}, "is not finished"),
        ({"variants": [{"name": "Control", "evaluations": ["seed-0/Control/nothing.jsonl"]}]}, "nothing.jsonl|has no"),
    ],
)
def test_what_is_not_finished_is_refused(tmp_path, where, changes, said):
    with pytest.raises(UserError, match=said):
        demo.main([finished(tmp_path / "a", [0], **changes), *where])


def test_readme_has_what_the_results_say():
    page = demo.PAGE.read_text(encoding="utf-8")
    table = demo.table(json.loads(demo.RESULTS.read_text())) if demo.RESULTS.is_file() else ""
    assert demo.with_tables(page, table, demo.BEGIN, demo.END) == page, "run `python -m bench demo`"
