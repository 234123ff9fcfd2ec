"""The files that other people's tools read: workflows, pre-commit hooks, the citation."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from sendvae_fast import __version__

ROOT = Path(__file__).parents[1]


def read(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_workflow_runs_ci_and_builds_wheels():
    steps = [step for job in read(".github/workflows/ci.yml")["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert ".ci/run" in commands and (ROOT / ".ci/run").stat().st_mode & 0o100
    nightly = read(".github/workflows/ci.yml")["jobs"]["test-all"]
    assert nightly["if"] == "github.event_name == 'schedule'" and nightly["steps"][-1]["run"] == ".ci/run test-all"
    assert any(command.startswith("pip wheel") for command in commands)
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", step["uses"]) for step in steps if "uses" in step)


def test_what_make_test_leaves_out_names_a_test_that_notices_the_same():
    trees = {file: ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("test_*.py")}
    marks = [
        (file, node.args[0].value)
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.repeats"
    ]
    assert marks
    for file, test in marks:
        name, _, function = test.partition("::")
        there = [node for node in ast.walk(trees[ROOT / "tests" / name]) if isinstance(node, ast.FunctionDef)]
        assert function in {node.name for node in there}, f"{file} repeats {test}, which is not there"


def test_hooks_have_the_pinned_versions():
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    hooks = {hook["id"]: hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    for hook in ("ruff", "ruff-format", "clang-format"):
        (package,) = hooks[hook]["additional_dependencies"]
        assert package in pinned


@pytest.mark.parametrize("hook", ["end-of-file-fixer", "check-added-large-files"])
def test_what_a_hook_leaves_out_is_there(hook):
    (pattern,) = [h["exclude"] for repo in read(".pre-commit-config.yaml")["repos"] for h in repo["hooks"]
                  if h["id"] == hook]  # fmt: skip
    for part in re.findall(r"[\w/\\.]+/[\w\\.]*", pattern):
        assert (ROOT / part.replace("\\", "")).exists(), part


def test_the_citation_is_of_this_version():
    citation = read("CITATION.cff")
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "Semantic-Disentangled VAE" in citation["references"][0]["title"]


@pytest.mark.parametrize("form", ["bug_report", "feature_request"])
def test_issue_forms_have_what_github_asks_for(form):
    content = read(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in content["body"])
