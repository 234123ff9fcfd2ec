"""docs/reliability.md names tests that there are, and shows the counts that were made."""

import ast

import pytest
from reliability_page import BLOCK, PAGE, PROMISES, ROOT, named_tests, read_counts, render


def test_every_test_that_is_named_exists():
    named = [test for promises in PROMISES.values() for promise in promises for test in promise.tests]
    assert len(named) == len(set(named)) > 40
    for test in named:
        file, _, function = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_the_page_is_what_the_script_makes_of_the_counts():
    page = PAGE.read_text(encoding="utf-8")
    assert {area for _, area, _ in BLOCK.findall(page)} == set(PROMISES)
    assert page == render(page, read_counts()), "run `python tests/reliability_page.py`"


def test_the_counts_are_of_promises_and_all_held():
    counts = read_counts()
    assert counts and {count["test"].partition("[")[0] for count in counts} <= named_tests()
    assert all(0 < count["survived"] == count["tried"] for count in counts)


def test_a_count_reaches_its_row():
    promise = PROMISES["data"][0]
    count = {
        "test": f"tests/{promise.tests[0]}",
        "tried": 1200,
        "survived": 1199,
        "date": "2031-02-03T",
        "commit": "abc",
    }
    page = render("a\n<!-- promises: data -->\nstale words\n<!-- end -->\nb\n", [count])
    assert f"| {promise.words} | `{promise.tests[0]}` | 1,200 | 1,199 | 2031-02-03, abc |\n" in page
    assert "stale words" not in page and page.startswith("a\n") and page.endswith("<!-- end -->\nb\n")


def test_the_page_says_how_much_was_counted():
    named = sorted(named_tests())
    count = {"promise": "damage", "tried": 20, "survived": 20, "date": "2031-02-03T04:05", "commit": "abc"}
    counts = [{**count, "test": f"{test}[{case}]"} for test in named[2:] for case in "ab"]
    steps_of_a_soak = {**counts[0], "promise": "soak", "tried": 5000, "survived": 5000}
    page = render("<!-- covered -->\n<!-- end -->\n", [*counts, {**counts[0], "date": "2031-02-05"}, steps_of_a_soak])
    assert f"{len(named) - 2} of the {len(named)} tests on this page, from 2031-02-03 to 2031-02-05, with" in page
    trials = 20 * (2 * (len(named) - 2) + 1)
    assert f"{trials:,} trials, of which {trials:,} held. The other 2 have dashes." in page
    assert "The other" not in render(page, [{**count, "test": test} for test in named])


@pytest.mark.parametrize("mechanism", ["data/decode.py", "data/limits.py", "data/indexing/sandbox.py", "reading.py"])
def test_the_mechanisms_of_the_threat_model_exist(mechanism):
    assert f"`{mechanism}`" in PAGE.read_text() and (ROOT / "sendvae_fast" / mechanism).is_file()
