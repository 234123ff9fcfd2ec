"""What importing the library loads. Each test asks a fresh process: in this one everything is there already."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

LAZY = ("torch._dynamo", "triton", "torchvision", "timm", "deepspeed", "lpips", "pyarrow", "matplotlib")


def modules_after(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_the_package_loads_nothing_but_itself():
    names = modules_after("import sendvae_fast; dir(sendvae_fast)") - modules_after("")
    assert "sendvae_fast" in names
    assert not {name for name in names if name.split(".")[0] not in {"sendvae_fast", *sys.stdlib_module_names}}


@pytest.mark.parametrize("module", ["ops", "nn", "pretrained"])
def test_a_module_loads_torch_and_little_else(module):
    names = modules_after(f"import sendvae_fast.{module}")
    assert "torch" in names and f"sendvae_fast.{module}" in names
    assert not names & set(LAZY)
