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
