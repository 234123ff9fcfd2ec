"""Pictures on their way to a GPU."""

import pyarrow as pa
import pytest
import torch

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.dali_decoder import import_dali
from sendvae_fast.data.decode import examine
from sendvae_fast.data.loader import ImageLoader
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.engine.streams import LastUse, SideStream

GPU = torch.device("cuda")
BUSY = 200_000_000
"""Cycles: about a tenth of a second."""


def test_pillows_batches_are_pinned_and_arrive_whole(tmp_path):
    synth_scenes(tmp_path, 24, size=32, seed=0)
    config = LoaderConfig(num_threads=1, decoder="pillow")
    arrived, sent = [], []
    for batch in ImageLoader(Catalog.open(tmp_path), 32, config, GPU).in_order(8):
        assert batch.images.is_pinned()
        arrived.append(batch.images.to(GPU, non_blocking=True))
        sent.append(batch.images.clone())
    assert torch.equal(torch.cat(arrived).cpu(), torch.cat(sent))


@pytest.mark.skipif(import_dali() is None, reason="DALI is not installed")
def test_dalis_batches_are_pillows_but_for_rounding(tmp_path):
    """Also while the stream that takes them is busy, so that they wait, and their memory with them."""
    synth_scenes(tmp_path, 48, size=64, seed=0)
    catalog = Catalog.open(tmp_path)
    facts = [examine(catalog.read(i), catalog.names[i]) for i in range(len(catalog))]
    table = pa.table({"verdict": [fact.verdict for fact in facts], "format": [fact.format for fact in facts]})
    catalog = Catalog(catalog.listing, facts=table)
    arrived = []
    for batch in ImageLoader(catalog, 48, LoaderConfig(decoder="dali", cache_mb=0), GPU).in_order(8):
        assert batch.images.is_cuda
        torch.cuda._sleep(BUSY)
        arrived.append(batch.images.int())
        del batch
    truth = ImageLoader(catalog, 48, LoaderConfig(decoder="pillow")).in_order(len(catalog))
    error = (torch.cat(arrived).cpu() - next(truth).images.int()).abs()
    assert error.float().mean() <= 1 and error.max() <= 16


def test_what_is_handed_over_is_waited_for_and_kept():
    side, taken = SideStream(GPU), []
    for number in range(4):
        with side.active():
            torch.cuda._sleep(BUSY)
            made = torch.full((2**20,), float(number), device=GPU)
            hand_over = side.hand_over(made)
        torch.cuda._sleep(BUSY // 2)  # the stream that takes it still reads when the next one is made
        taken.append(hand_over.take() + 1)
        del made, hand_over
    assert [x.unique().tolist() for x in taken] == [[1.0], [2.0], [3.0], [4.0]]


def test_pinned_memory_is_filled_again_when_the_copy_is_done():
    buffer, last_use, arrived = torch.empty(2**20, pin_memory=True), LastUse(), []
    for number in range(4):
        last_use.wait()
        buffer.fill_(number)
        torch.cuda._sleep(BUSY)
        arrived.append(buffer.to(GPU, non_blocking=True))
        last_use.note()
    assert [x.unique().tolist() for x in arrived] == [[0.0], [1.0], [2.0], [3.0]]
