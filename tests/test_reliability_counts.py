"""The file of counts: one line for what was tried, the newest; nothing where nobody asked."""

import json

import pytest
import reliability_counts


def test_a_count_replaces_the_older_one_of_the_same(tmp_path, monkeypatch):
    file = tmp_path / "counts.json"
    monkeypatch.setenv(reliability_counts.FILE_VARIABLE, str(file))
    reliability_counts.record("kill", "1,000 kills", tried=1000, survived=999)
    reliability_counts.record("disk", "full disks", tried=3, survived=3)
    reliability_counts.record("kill", "1,000 kills", tried=1000, survived=1000)
    disk, kill = map(json.loads, file.read_text().splitlines())
    assert (disk["promise"], disk["tried"], disk["survived"]) == ("disk", 3, 3)
    assert (kill["promise"], kill["tried"], kill["survived"]) == ("kill", 1000, 1000)
    assert kill["test"].endswith("::test_a_count_replaces_the_older_one_of_the_same")
    assert kill.keys() == {"promise", "what", "tried", "survived", "test", "commit", "date"}


def test_trials_replace_the_cases_of_their_test(tmp_path, monkeypatch):
    file = tmp_path / "counts.json"
    monkeypatch.setenv(reliability_counts.FILE_VARIABLE, str(file))
    for test, what in (("a.py::f", "cases of the test"), ("a.py::g", "cases of the test"), ("a.py::f[x]", "copies")):
        reliability_counts.record("", what, tried=2, survived=2, test=test)
    left = {(entry["test"], entry["what"]) for entry in map(json.loads, file.read_text().splitlines())}
    assert left == {("a.py::g", "cases of the test"), ("a.py::f[x]", "copies")}


def test_counts_of_cases_replace_that_of_the_whole_test(tmp_path, monkeypatch):
    file = tmp_path / "counts.json"
    monkeypatch.setenv(reliability_counts.FILE_VARIABLE, str(file))
    for test in ("a.py::f", "a.py::g", "a.py::f[x]", "a.py::f[y]"):
        reliability_counts.record("kill", "kills", tried=2, survived=2, test=test)
    left = [json.loads(line)["test"] for line in file.read_text().splitlines()]
    assert left == ["a.py::f[x]", "a.py::f[y]", "a.py::g"]


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.delenv(reliability_counts.FILE_VARIABLE, raising=False)
    monkeypatch.setattr(reliability_counts, "ROOT", tmp_path)
    reliability_counts.record("kill", "1,000 kills", tried=1, survived=1)
    assert not list(tmp_path.iterdir())


def test_trials_go_on_after_a_failure_and_fail_at_the_end(tmp_path, monkeypatch):
    file = tmp_path / "counts.json"
    monkeypatch.setenv(reliability_counts.FILE_VARIABLE, str(file))
    seen = []
    with (
        pytest.raises(AssertionError, match="1 of 3 failed, the first at second: lost"),
        reliability_counts.counting("kill", "three kills") as trials,
    ):
        for name in ("first", "second", "third"):
            with trials.trial(name):
                seen.append(name)
                assert name != "second", "lost"
    assert seen == ["first", "second", "third"]
    assert [json.loads(line)["survived"] for line in file.read_text().splitlines()] == [2]
