"""The Python in README.md and docs/library.md runs as it stands, where `runs/` has a run of each stage."""

import re
from pathlib import Path

import pytest
import torch

from sendvae_fast import nn

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_snippets_run(page, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for name, stage in (("send", "vae"), ("xl", "sit")):
        (tmp_path / "runs" / name).symlink_to(ROOT / "tests" / "old_runs" / stage)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    for block in blocks:  # of one page, one after the other
        exec(block, names)
    assert names["pictures"].shape[0] == 4 and names["pictures"].dtype == torch.uint8
    if page == "README.md":
        assert nn.accelerate(names["network"]) == 0, "the snippet has swapped what there is"
        assert names["latents"].shape[:2] == (4, 4)
    else:
        assert names["loss"] > 0 and names["again"].shape == names["pictures"].shape
