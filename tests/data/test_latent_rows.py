import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sendvae_fast.data.latents import latent_rows
from sendvae_fast.data.latents.latent_rows import LatentReader, LatentRows
from sendvae_fast.data.latents.shard_format import tensor_places
from sendvae_fast.errors import UserError
from sendvae_fast.ops import library

SHAPE = (3, 4, 5)
COUNTS = (5, 1, 7, 4)
NUM = sum(COUNTS)
VARIANTS = [("mean", "std"), ("mean_flip", "std_flip")]
needs_host = pytest.mark.skipif(library.host() is None, reason=f"host module: {library.status()['host']}")


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def shards(request, tmp_path):
    """Files of different sizes, and what they hold: [variant][field] -> [NUM, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    whole = {
        name: torch.randn(NUM, *SHAPE, generator=generator).to(request.param) for fields in VARIANTS for name in fields
    }
    paths = []
    for k, (start, count) in enumerate(zip(np.cumsum((0, *COUNTS[:-1])), COUNTS, strict=True)):
        paths.append(tmp_path / f"part {k}.safetensors")
        part = {name: value[start : start + count].contiguous() for name, value in whole.items()}
        save_file({**part, "labels": torch.arange(count)}, paths[-1])
    return paths, [[whole[name] for name in fields] for fields in VARIANTS]


@pytest.fixture(params=["native", "python"])
def reader_kind(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(latent_rows.library, "host", lambda: None)
    elif library.host() is None:
        pytest.skip(f"host module: {library.status()['host']}")
    return request.param


def test_tensor_places_are_where_the_bytes_are(shards):
    paths, truth = shards
    places = tensor_places(paths[2])
    content, start = paths[2].read_bytes(), COUNTS[0] + COUNTS[1]
    for fields, values in zip(VARIANTS, truth, strict=True):
        for name, value in zip(fields, values, strict=True):
            place = places[name]
            assert place.shape == (COUNTS[2], *SHAPE) and place.dtype == value.dtype
            stored = content[place.offset : place.offset + COUNTS[2] * place.row_bytes]
            assert stored == value[start : start + COUNTS[2]].contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("num_threads", "read_ahead"), [(1, 0), (2, 1), (7, 20)])
def test_batches_come_in_order_with_their_rows(shards, reader_kind, num_threads, read_ahead):
    paths, truth = shards
    rows = LatentRows.of_files(paths, VARIANTS)
    assert len(rows) == NUM and rows.shape == SHAPE and rows.num_variants == rows.num_fields == 2
    generator = torch.Generator().manual_seed(1)
    plan = []
    for number, batch in enumerate((6, 6, 1, 11, 6, 0, 6, 6, 40)):
        ids = torch.randint(NUM, (batch,), generator=generator)
        plan.append((ids, None if number % 3 == 0 else torch.randint(2, (batch,), generator=generator), number))
    reader = LatentReader(rows, num_threads=num_threads, read_ahead=read_ahead)
    for _ in range(2):  # a reader can be used again
        for delivered, ((fields, number), (ids, variants, _)) in enumerate(
            zip(reader.read(iter(plan)), plan, strict=True)
        ):
            assert number == delivered
            variants = torch.zeros_like(ids) if variants is None else variants
            for f, field in enumerate(fields):
                expected = torch.stack([truth[v][f] for v in range(2)])[variants, ids]
                assert field.dtype == rows.dtype and torch.equal(field, expected)


def test_the_plan_is_asked_for_as_far_ahead_as_told(shards):
    if library.host() is None:
        pytest.skip("without the host module nothing is read ahead")
    asked = []

    def plan():
        for number in range(9):
            asked.append(number)
            yield torch.tensor([number]), None, number

    batches = LatentReader(LatentRows.of_files(shards[0], VARIANTS), read_ahead=3).read(plan())
    next(batches)
    assert asked == [0, 1, 2, 3]
    next(batches)
    assert asked == [0, 1, 2, 3, 4]
    batches.close()


def test_a_shard_cut_short_is_named(shards, reader_kind):
    paths, _ = shards
    rows = LatentRows.of_files(paths, VARIANTS)
    paths[2].write_bytes(paths[2].read_bytes()[:-7])
    good, bad = torch.arange(5), torch.tensor([0, 7])
    batches = LatentReader(rows, read_ahead=0).read([(good, None, 0), (bad, None, 1), (good, None, 2)])
    assert next(batches)[1] == 0  # what is whole still comes
    with pytest.raises(UserError, match="part 2.safetensors.*replace it"):
        next(batches)


@needs_host
def test_a_shard_cut_short_while_open_is_named(shards):
    """The size was right when the file was opened: the read itself must notice, and nothing may crash."""
    paths, _ = shards
    reader = LatentReader(LatentRows.of_files(paths, VARIANTS), num_threads=1, read_ahead=0)
    batches = reader.read((torch.tensor([6, 12]), None, number) for number in range(3))
    next(batches)
    with open(paths[2], "r+b") as file:
        file.truncate(400)
    with pytest.raises(UserError, match="part 2.safetensors ends before byte"):
        next(batches)


def test_bad_ids_and_variants(shards, reader_kind):
    reader = LatentReader(LatentRows.of_files(shards[0], VARIANTS), read_ahead=0)
    for ids, variants in (([NUM], [0]), ([-1], [0]), ([0], [2]), ([0], [-1])):
        with pytest.raises(IndexError):
            next(reader.read([(torch.tensor(ids), torch.tensor(variants), None)]))


@needs_host
def test_buffers_are_checked():
    host = library.host()
    reader = host.LatentReader([("/nowhere", 100, 4, [20])], [20])
    assert reader.num_samples == 4
    for buffer, message in (
        (np.empty(39, np.uint8), "buffer 0 holds 39 bytes, but the rows take 40"),
        (np.empty(80, np.uint8)[::2], "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            reader.submit([0, 1], [0, 0], [buffer])
    with pytest.raises(ValueError, match="one variant per id"):
        reader.submit([0, 1], [0], [np.empty(40, np.uint8)])
    with pytest.raises(ValueError, match="takes 1 buffers, got 2"):
        reader.submit([0], [0], [np.empty(20, np.uint8)] * 2)
    with pytest.raises((ValueError, BufferError)):
        reader.submit([0], [0], [bytes(20)])
    with pytest.raises(OSError, match="/nowhere: No such file"):
        reader.submit([0], [0], [np.empty(20, np.uint8)]).wait()
    for shard in (("x", 99, 4, [20]), ("x", 100, 4, [-1]), ("x", 100, 4, [])):
        with pytest.raises(ValueError, match="rows reach past the end|an offset for every field"):
            host.LatentReader([shard], [20])
    with pytest.raises(ValueError, match="row_bytes"):
        host.LatentReader([], [])


@needs_host
def test_a_dropped_batch_still_owns_its_buffers(shards):
    """Tickets that nobody waits for, buffers that nobody else holds: the threads must not write to freed memory."""
    reader = LatentReader(LatentRows.of_files(shards[0], VARIANTS), num_threads=3, read_ahead=50)
    for _ in range(20):
        batches = reader.read((torch.arange(NUM), None, None) for _ in range(60))
        next(batches)
        batches.close()
        del batches


def test_shards_of_another_kind_are_refused(tmp_path, shards):
    paths, _ = shards
    other = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(3, 3, 4, 6) for fields in VARIANTS for name in fields}, other)
    with pytest.raises(UserError, match=r"mean in the latent shard .*other.* like the others"):
        LatentRows.of_files([*paths, other], VARIANTS)
    save_file({"latents": torch.zeros(3, *SHAPE)}, other)
    with pytest.raises(UserError, match="other.safetensors has no tensor 'mean'"):
        LatentRows.of_files([other], VARIANTS)
    other.write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(UserError, match="other.safetensors cannot be read"):
        LatentRows.of_files([other], VARIANTS)
    with pytest.raises(UserError, match="no latent shards"):
        LatentRows.of_files([], VARIANTS)
