"""A published generator's checkpoint is sampled as it is."""

import pytest
from tiny_networks import save_decoder, save_generator

from sendvae_fast.cli.main import main

pytestmark = pytest.mark.slow


def test_a_checkpoint_in_repa_es_layout_gives_the_same_pictures(tmp_path):
    # Normalised queries and keys tell the width of a head, which a width that nobody published does not.
    ours, decoder = save_generator(tmp_path / "ours", qk_norm=True), save_decoder(tmp_path / "vae")
    assert main(["convert", str(ours), "--to=repa-e", f"--out={tmp_path / 'theirs'}"]) == 0
    for generator, out in ((ours, "a"), (tmp_path / "theirs" / "generator.pt", "b")):
        assert main(["sample", f"--generator={generator}", f"--autoencoder={decoder}", f"--out={tmp_path / out}",
                     "--num_samples=3", "--sampler.num_steps=3"]) == 0  # fmt: skip
    for number in range(3):
        name = f"{number:06d}.png"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
