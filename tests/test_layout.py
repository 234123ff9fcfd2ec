"""Imports only go down the floors of docs/design.md and never in a circle; no sibling's private name is imported."""

import ast
import re
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sendvae_fast"
FLOORS = [
    {"errors", "checks", "progress", "config", "files", "hub", "image_grid", "png", "processes", "reading", "version"},
    {"ops"},
    {"engine"},
    {"models", "losses", "data"},
    {"sampling", "evaluation", "train", "nn"},
    {"report", "pretrained", "plan", "weights"},
    {"compare", "demo", "downstream", "play"},
    {"cli", "__main__"},
    {"__init__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


@cache
def parsed():
    """Every file of the package, and all that its syntax tree has."""
    return {file: list(ast.walk(ast.parse(file.read_text()))) for file in PACKAGE.rglob("*.py")}


def imports():
    """(file, its part, imported part, imported name) for every import of our own package."""
    for file, nodes in parsed().items():
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in nodes:
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


def test_no_picture_is_opened_in_a_format_that_is_not_named():
    """Pillow tries every plugin otherwise; that for EPS starts Ghostscript on a file from a stranger."""
    opened = [
        (file, {keyword.arg for keyword in node.keywords})
        for file, nodes in parsed().items()
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert opened and all("formats" in keywords for _, keywords in opened), opened


def test_no_private_names_are_imported():
    private = [f"{file}: {name}" for file, _, _, name in imports() if name.startswith("_") and name != "__version__"]
    assert not private


def module_of(file):
    """sendvae_fast.ops.philox of its file; of an __init__.py, the package."""
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_import_circle():
    """Of any import, also in a function or for type checkers alone: a circle has no floor, wherever it is closed."""
    graph = {module_of(file): set() for file in parsed()}
    for file, nodes in parsed().items():
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} has a relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            modules = {name if name in graph else name.rpartition(".")[0] for name in names}
            graph[module_of(file)] |= modules & graph.keys() - {module_of(file)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


ORDER = re.compile(
    r"\.cuda\.(Stream|Event|stream|graph|CUDAGraph|current_stream|synchronize)\b|\b(wait|record)_(stream|event)\b"
)
TIMES = {"ops/attention/tuning.py", "compare/timeline.py"}
"""What measures time waits for the device."""


def test_one_module_orders_the_work_of_a_gpu():
    """tests/fake_cuda tests that module's users; what orders work elsewhere would go untested."""
    ordering = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if ORDER.search(file.read_text())}
    assert ordering - TIMES == {"engine/streams.py"}


def test_no_two_test_modules_share_a_name():
    """Folders of tests are no packages: pytest imports the first module of a name, and stops at the second."""
    tests = [file for file in Path(__file__).parent.rglob("*.py") if not (file.parent / "__init__.py").exists()]
    counts = Counter(file.stem for file in tests if file.stem != "conftest")
    assert not {name: count for name, count in counts.items() if count > 1}
