"""Everything the commands write is open to whom the user's umask lets in, and nothing unfinished stays behind."""

import os

import pytest
import torch
from tiny_runs import cache_of, sit_config, vae_config

from sendvae_fast.cli.main import main
from sendvae_fast.ops.attention import table
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

pytestmark = pytest.mark.slow

pytestmark = pytest.mark.slow
UMASK = 0o027


@pytest.fixture
def umask():
    before = os.umask(UMASK)
    yield
    os.umask(before)


def test_permissions_of_every_file(umask, images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vae, sit, latents, png = (tmp_path / name for name in ("vae", "sit", "latents", "png"))
    loop = {"num_steps": 2, "save_every": 1, "preview_every": 2}
    assert train_vae(vae_config(vae, images, loop=loop)) == 0
    cache_of(vae, images, latents)
    assert train_sit(sit_config(sit, images, latents, loop=loop, autoencoder=str(vae))) == 0
    table.save(torch.device("cpu"), [])
    for command in (
        f"data synth {tmp_path}/scenes --num_images=24 --size=32",
        f"data index {tmp_path}/scenes --out={tmp_path}/scenes.parquet --num_workers=1",
        f"data pack {tmp_path}/scenes.parquet --out={tmp_path}/packed --num_workers=1",
        f"sample --generator={sit} --autoencoder={vae} --out={png} --npz --num_samples=2 --sampler.num_steps=2",
        f"evaluate generation --reference={images} --samples={png} --features.name=demo --out={tmp_path}/result.jsonl",
        f"report {vae}",
        *(f"convert {vae} --to={layout} --out={tmp_path}/vae_{layout}" for layout in ("diffusers", "sendvae")),
        *(f"convert {sit} --to={layout} --out={tmp_path}/sit_{layout}" for layout in ("generator", "repa-e")),
    ):
        assert main(command.split()) == 0, command
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= set(
        ".safetensors .json .yaml .jsonl .png .npz .html .pt .md .csv .jpg .tar .parquet".split()
    )
    private = [str(path.relative_to(tmp_path)) for path in written if path.stat().st_mode & 0o777 != 0o666 & ~UMASK]
    assert not private
    assert not [path for path in written if ".tmp" in path.name]
