"""Imports only go down the floors of docs/design.md, and nothing imports a sibling's private name."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sendvae_fast"
FLOORS = [
    {"errors", "checks", "progress", "config", "files", "image_grid", "version"},
    {"ops"},
    {"engine"},
    {"models", "losses", "data"},
    {"sampling", "evaluation", "train", "nn"},
    {"report", "pretrained"},
    {"demo"},
    {"cli", "__main__"},
    {"__init__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports():
    """(file, its part, imported part, imported name) for every import of our own package."""
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sendvae_fast":
                words = node.module.split(".")
                for alias in node.names:
                    target = words[1] if len(words) > 1 else (alias.name if alias.name in FLOOR else "__init__")
                    yield file, part, target, alias.name


def test_every_part_is_on_a_floor():
    assert {part for _, part, _, _ in imports()} <= FLOOR.keys()


def test_imports_go_down():
    upward = [f"{file}: {part} imports {target}" for file, part, target, _ in imports() if FLOOR[target] > FLOOR[part]]
    assert not upward


def test_no_private_names_are_imported():
    private = [f"{file}: {name}" for file, _, _, name in imports() if name.startswith("_") and name != "__version__"]
    assert not private
