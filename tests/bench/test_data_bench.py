"""The data benchmark measures what it says, on inputs small enough for a test."""

import json
from types import SimpleNamespace

import pytest

from bench import data, table
from sendvae_fast.data.decode import examine
from sendvae_fast.errors import UserError

pytestmark = pytest.mark.slow


def test_textures_are_ordinary_jpegs_of_a_photographs_size():
    encoded = data.texture(0)
    facts = examine(encoded, "x.jpg")
    assert (facts.verdict, facts.width, facts.height) == ("ok", 500, 375) and 20_000 < len(encoded) < 200_000


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(data, "NUM_PHOTOGRAPHS", 2)
    monkeypatch.setattr(data, "NUM_LATENTS", 64)
    monkeypatch.setattr(data, "SHARD_SIZE", 32)
    monkeypatch.setattr(data, "LATENT_BATCH", 16)


def test_rows_and_their_table(tiny, tmp_path, capsys):
    options = ["--parts", "decode", "latents", "--seconds", "0.01", "--out", str(tmp_path)]
    assert data.main(options) == 0
    (file,) = tmp_path.glob("data_*.json")
    rows = {row["part"]: row for row in json.loads(file.read_text())}
    assert set(rows) == {"decode", "latents"}
    for row in rows.values():
        assert all(result["q1_per_s"] <= result["per_s"] <= result["q3_per_s"] for result in row["forms"].values())
    assert data.main(["--parts", "decode", *options[3:]]) == 0
    assert {row["part"] for row in json.loads(file.read_text())} == {"decode", "latents"}  # the other part stays
    text = table.data_tables(tmp_path)
    assert "| latents | 64 samples of mean and std [32, 16, 16], bfloat16, batches of 16 | LatentReader, 2 thre" in text
    assert "Pillow, our crop" in text


def test_both_ways_of_reading_latents_give_all_of_them(tiny, tmp_path, monkeypatch):
    counts = []

    def count(batches):
        # LatentReader gives (fields, anything), the DataLoader the fields [B, C, H, W] themselves.
        fields = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
        counts.append(sum(len(mean) for mean, _ in fields))

    monkeypatch.setattr(data, "consume", count)
    monkeypatch.setattr(data, "measured", lambda calls, *_: [call(0) for call in calls.values()] and {})
    data.latents_row(tmp_path, None, SimpleNamespace(seconds=0.0))
    assert counts == [64] * 4


def test_errors(tmp_path):
    with pytest.raises(UserError, match="invalid choice"):
        data.main(["--parts", "network"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match="no ordinary JPEGs"):
        data.photographs(tmp_path)
