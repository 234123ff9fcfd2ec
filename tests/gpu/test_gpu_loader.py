"""Pictures on their way to a GPU."""

import torch

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.loader import ImageLoader, LoaderConfig
from sendvae_fast.data.scenes.scene_folder import synth_scenes


def test_pillows_batches_are_pinned_and_arrive_whole(tmp_path):
    synth_scenes(tmp_path, 24, size=32, seed=0)
    config = LoaderConfig(num_threads=1, decoder="pillow")
    device = torch.device("cuda")
    arrived, sent = [], []
    for batch in ImageLoader(Catalog.open(tmp_path), 32, config, device).in_order(8):
        assert batch.images.is_pinned()
        arrived.append(batch.images.to(device, non_blocking=True))
        sent.append(batch.images.clone())
    assert torch.equal(torch.cat(arrived).cpu(), torch.cat(sent))
