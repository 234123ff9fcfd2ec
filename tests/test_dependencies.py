"""Declared dependencies are those that something imports: the base install, every extra, every verb, the pins."""

import ast
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import forks
import pytest

from sendvae_fast.cli.main import EXTRAS, VERBS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where a package's name on the index is not that of its module.
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "nvidia": "nvidia-dali-cuda130"}
# Modules that no dependency declares: torch brings Triton, Gradio its client and httpx; of flash-attn README.md tells.
UNDECLARED = {"triton", "flash-attn", "flash-attn-interface", "gradio-client", "httpx"}
# Modules that `ops.attention` imports by their names.
IMPORTED_BY_NAME = {"flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers.ops"}
# What is used by its command or as a plugin, not imported.
TOOLS = {"ruff", "pytest-xdist", "pyright", "pre-commit", "clang-format", "mkdocs-material", "mkdocstrings"}


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def packages_of(*extras: str) -> set[str]:
    """What the base install and these extras declare, extras of extras included."""
    names = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            nested = re.match(r"sendvae_fast\[(.+)\]", requirement)
            names |= packages_of(*nested[1].split(",")) if nested else {name_of(requirement)}
    return names


def package_of(module: str) -> str:
    """The package on the index that holds a module."""
    if module.startswith("torch.utils.tensorboard"):
        return "tensorboard"
    top = module.partition(".")[0]
    return PACKAGES.get(top, top).lower().replace("_", "-")


@cache
def modules_imported_by(file: Path, at_import: bool = False) -> frozenset[str]:
    """Modules that a file imports, in functions or by a name in a string too unless only those `at_import`."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.Constant) and not at_import and isinstance(node.value, str):
            found.update({node.value} & IMPORTED_BY_NAME)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (at_import and (inside or type_checking)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(file.read_text()))
    return frozenset(found)


def imported_packages(*folders: str) -> set[str]:
    """Packages that any file in these folders imports, without Python's own and the repository's."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    own = {"sendvae_fast", "bench", "tests"} | {file.stem for file in files} | {file.parent.name for file in files}
    modules = {module for file in files for module in modules_imported_by(file)}
    tops = {module.partition(".")[0]: module for module in modules if package_of(module) != "tensorboard"}
    named = {package_of(module) for top, module in tops.items() if top not in own | sys.stdlib_module_names}
    return named | {"tensorboard" for module in modules if package_of(module) == "tensorboard"}


@cache
def file_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def packages_needed_to_import(module: str) -> set[str]:
    """Packages that are imported when a module of ours is, by whatever it imports."""
    seen, packages, pending = set(), set(), [module]
    while pending:
        words = pending.pop().split(".")
        for name in (".".join(words[:count]) for count in range(1, len(words) + 1)):
            if name in seen or (file := file_of(name)) is None:
                continue
            seen.add(name)
            for imported in modules_imported_by(file, at_import=True):
                if imported.partition(".")[0] == "sendvae_fast":
                    pending.append(imported)
                elif imported.partition(".")[0] not in sys.stdlib_module_names:
                    packages.add(package_of(imported))
    return packages


def test_the_search_follows_imports():
    assert {"torch", "timm", "lpips"} <= packages_needed_to_import("sendvae_fast.train.vae.stage")
    assert {"deepspeed", "tensorboard", "xformers", "torchdiffeq", "gradio"} <= imported_packages("sendvae_fast")


def test_what_the_package_imports_is_declared():
    assert imported_packages("sendvae_fast") - UNDECLARED <= packages_of("all", "play")


def test_what_is_declared_is_imported():
    assert packages_of("all", "play") <= imported_packages("sendvae_fast")


def test_what_the_tests_import_is_declared():
    build = {"setuptools", "pybind11"}
    assert imported_packages("tests", "bench", "examples") - UNDECLARED - build <= packages_of("all", "test")


def test_what_the_test_extra_declares_is_imported():
    own = {name_of(requirement) for requirement in PROJECT["optional-dependencies"]["test"]}
    assert own - TOOLS <= imported_packages("tests", "examples")


@pytest.mark.parametrize(
    "module", ["ops", "nn", "pretrained", "models.autoencoder.storage", "models.sit.storage", "sampling.generate"]
)
def test_the_library_needs_the_base_install_only(module):
    assert packages_needed_to_import(f"sendvae_fast.{module}") <= packages_of()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_needs_no_more_than_the_extra_it_names(verb):
    extras = EXTRAS.get(verb.split()[0], "train").split(",")
    module = "sendvae_fast.cli." + verb.replace(" ", "_").replace("-", "_")
    assert packages_needed_to_import("sendvae_fast.cli.main") <= packages_of(*extras)
    done_by_run = {name for name in modules_imported_by(file_of(module)) if file_of(name) is not None}
    for imported in {module} | done_by_run:
        assert packages_needed_to_import(imported) <= packages_of(*extras), imported


def test_everything_that_make_installs_is_pinned():
    """requirements.txt has what the extras ask for, but for what needs a GPU or is an alternative."""
    text = "".join(
        (ROOT / name).read_text()
        for name in ("requirements.txt", "requirements-deepspeed.txt", "requirements-play.txt")
    )
    pinned = {name_of(line) for line in text.splitlines() if "==" in line}
    unpinned = {"trackio", "wandb"}  # trackio wants an older Pillow; the tests of both run where they are installed
    assert packages_of("train", "eval", "data", "logging", "play", "test") - unpinned <= pinned


def test_a_package_in_several_extras_has_one_range():
    ranges: dict[str, set[str]] = {}
    for requirements in PROJECT["optional-dependencies"].values():
        for requirement in requirements:
            ranges.setdefault(name_of(requirement), set()).add(requirement)
    assert not {name: several for name, several in ranges.items() if len(several) > 1}


as_others = pytest.mark.repeats("test_dependencies.py::test_a_verb_needs_no_more_than_the_extra_it_names")


@pytest.mark.parametrize(
    "missing, arguments, words",
    [
        ("jsonargparse", ["--help"], "the command line needs jsonargparse"),
        pytest.param("rich", ["doctor"], "`sendvae doctor` needs rich", marks=as_others),
        ("timm", ["train", "vae", "--run=x", "--data.root=y"], "`sendvae train vae` needs timm"),
        pytest.param(
            "torchmetrics", ["evaluate", "reconstruction", "--autoencoder=x", "--data=y"],
            "`sendvae evaluate reconstruction` needs torchmetrics", marks=as_others,
        ),
        ("jinja2", ["report", "runs/x"], "`sendvae report` needs jinja2"),
        pytest.param("gradio", ["play", "runs/x"], "`sendvae play` needs gradio", marks=as_others),
    ],
)  # fmt: skip
def test_a_missing_package_is_one_line_that_names_the_extra(missing, arguments, words):
    """As without it: `None` in sys.modules makes an import fail as if the package were not installed."""
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {arguments!r}; import runpy; "
    code += "runpy.run_module('sendvae_fast', run_name='__main__')"
    # What a verb that fails late needs first has none of these; the others are tried from nothing.
    imports = forks.TRAINING if missing in ("torchmetrics", "jinja2", "gradio") else ()
    done = forks.run(["-c", code], cwd=ROOT, imports=imports)
    assert done.returncode == 2 and done.stdout == ""
    line = done.stderr.strip()
    extra = re.fullmatch(re.escape(f"error: {words}") + r", .*: pip install 'sendvae_fast\[(.+)\]'", line)
    assert extra and missing in packages_of(*extra[1].split(","))
