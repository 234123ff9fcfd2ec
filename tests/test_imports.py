"""What importing the library loads. A test asks a fresh process: in this one everything is there already."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

LAZY = ("torch._dynamo", "triton", "torchvision", "timm", "deepspeed", "lpips", "pyarrow", "matplotlib")


def modules_after(*statements: str) -> list[set[str]]:
    """The modules that are loaded after each of the statements, which one process executes in turn."""
    program = "import sys\n" + "\n".join(f"{statement}\nprint(*sys.modules)" for statement in statements)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in result.stdout.splitlines()]


def test_the_package_loads_nothing_but_itself():
    before, after = modules_after("pass", "import sendvae_fast; dir(sendvae_fast)")
    assert "sendvae_fast" in after - before
    assert not {name for name in after - before if name.split(".")[0] not in {"sendvae_fast", *sys.stdlib_module_names}}


def test_a_module_loads_torch_and_little_else():
    modules = ("ops", "nn", "pretrained")
    for module, names in zip(modules, modules_after(*(f"import sendvae_fast.{name}" for name in modules)), strict=True):
        assert "torch" in names and f"sendvae_fast.{module}" in names
        assert not names & set(LAZY), module


HELP_WITHOUT_TORCH = """
import contextlib, io, sys
from sendvae_fast.cli.main import VERBS, main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
    said = {verb: main([*verb.split(), "--help"]) for verb in VERBS if verb != "doctor"}
    wrong = main(["train", "vae", "--config", "demo/vae", "--run=here", "--data.root=there", "--loop.num_stepz=3"])
    missing = main(["train", "sit", "--run=here"])
    shown = main(["config", "show", "train", "e2e", "--config", "e2e/va_vae"])
assert not any(said.values()) and (wrong, missing, shown) == (2, 2, 0), (said, wrong, missing, shown, out.getvalue())
"""


def test_help_and_what_is_wrong_with_an_option_need_no_torch():
    """Of every verb but doctor, which speaks of torch. Its import alone takes longer than all of them."""
    before, after = modules_after("pass", f"exec({HELP_WITHOUT_TORCH!r})")
    assert "sendvae_fast.train.vae.settings" in after - before
    assert not after & {"torch", "scipy", *LAZY} - {"pyarrow"}  # of the data verbs, whose work begins at once
