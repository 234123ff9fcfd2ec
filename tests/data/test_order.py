import numpy as np
import pytest

from sendvae_fast.data.order import BatchSchedule
from sendvae_fast.errors import UserError

MASK = 0xFFFFFFFF


def plain_philox(counter, key):
    """Philox4x32-10 written from the Random123 paper, on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def test_the_order_is_philox_of_the_design():
    """Against plain Philox4x32-10 on Python integers, itself checked by the published vectors."""
    assert plain_philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert plain_philox((MASK,) * 4, (MASK,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    for seed, epoch in ((0, 0), (7, 3), (2**63 - 5, 10**6)):
        key = splitmix64((splitmix64(seed) + epoch) % 2**64)
        drawn = [plain_philox((0, 7, i, 0), (key & MASK, key >> 32))[:2] for i in range(200)]
        signed = [((high << 32 | low) + 2**63) % 2**64 - 2**63 for high, low in drawn]
        assert BatchSchedule(200, 10, seed).permutation(epoch).tolist() == sorted(range(200), key=signed.__getitem__)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_samples", [24, 96, 101, 117])
def test_every_id_comes_exactly_once_per_epoch(num_samples, world_size):
    """Epochs are cut out of the stream of batches wherever they end; the last ones end inside a batch."""
    schedule, num_epochs = BatchSchedule(num_samples, 24, seed=3), 4
    steps = range(-(-num_epochs * num_samples // 24))
    stream = np.concatenate([schedule.ids(step, rank, world_size) for step in steps for rank in range(world_size)])
    for epoch in range(num_epochs):
        seen = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(seen.tolist()) == list(range(num_samples))
        assert np.array_equal(seen, schedule.permutation(epoch))


def test_the_world_size_may_change_at_any_step():
    """117 samples, as a run that is stopped at every step and goes on with another number of ranks."""
    whole = [BatchSchedule(117, 24, seed=3).ids(step) for step in range(30)]
    sizes = [1, 2, 3, 4, 8, 6]
    for stop in range(30):
        for step in (stop, stop + 1, 29):
            world_size = sizes[stop % len(sizes)]
            resumed = BatchSchedule(117, 24, seed=3)
            parts = [resumed.ids(step % 30, rank, world_size) for rank in range(world_size)]
            assert np.array_equal(np.concatenate(parts), whole[step % 30])


@pytest.mark.slow
@pytest.mark.parametrize("num_samples, batch, num_epochs", [(1_281_167, 1024, 2), (80_073, 1024, 80)])
def test_epochs_of_imagenet(num_samples, batch, num_epochs):
    """The paper's stage 1 by number alone: all of ImageNet, and as many epochs (of a sixteenth of it). Every id once in
    each epoch, batch by batch, and the same ids on 8 ranks from any step that a run is resumed at.
    """
    schedule, step, rest = BatchSchedule(num_samples, batch, seed=0), 0, np.empty(0, np.int64)
    resume_at = set(np.random.default_rng(0).integers(num_epochs * num_samples // batch, size=6).tolist())
    for _ in range(num_epochs):
        parts, count = [rest], len(rest)
        while count < num_samples:
            ids = schedule.ids(step)
            if step in resume_at:
                resumed = BatchSchedule(num_samples, batch, seed=0)
                assert np.array_equal(np.concatenate([resumed.ids(step, rank, 8) for rank in range(8)]), ids)
            parts.append(ids)
            step, count = step + 1, count + batch
        seen, rest = np.split(np.concatenate(parts), [num_samples])
        assert np.array_equal(np.bincount(seen, minlength=num_samples), np.ones(num_samples))
    assert step == -(-num_epochs * num_samples // batch)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_global_batch_is_the_same_for_any_world_size(world_size):
    schedule = BatchSchedule(num_samples=101, global_batch=12, seed=3)
    for step in (0, 7, 8, 30):
        parts = [BatchSchedule(101, 12, 3).ids(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), schedule.ids(step))


def test_any_step_can_be_asked_for_first():
    walked = BatchSchedule(50, 7, seed=1)
    stream = [walked.ids(step) for step in range(30)]
    for step in (29, 3, 14):
        assert np.array_equal(BatchSchedule(50, 7, seed=1).ids(step), stream[step])


def test_epochs_and_seeds_differ():
    schedule = BatchSchedule(num_samples=1000, global_batch=300, seed=0)
    first, second = schedule.permutation(0), schedule.permutation(1)
    assert (first == second).mean() < 0.02
    assert (first == BatchSchedule(1000, 300, seed=1).permutation(0)).mean() < 0.02


def test_order_is_uniform():
    """Mean position of each id over many epochs, against the law of a uniform permutation."""
    schedule = BatchSchedule(num_samples=50, global_batch=50, seed=5)
    positions = np.stack([np.argsort(schedule.permutation(epoch)) for epoch in range(2000)])
    deviation = (positions.mean(0) - 24.5) / (np.sqrt((50**2 - 1) / 12) / np.sqrt(2000))
    assert np.abs(deviation).max() < 4.5
    assert abs((deviation**2).mean() - 1.0) < 0.7


def test_a_returned_batch_may_be_changed():
    schedule = BatchSchedule(10, 5, 0)
    before = schedule.ids(0).tolist()
    schedule.ids(0)[:] = -1
    assert schedule.ids(0).tolist() == before


def test_errors():
    with pytest.raises(UserError, match="lower the batch size"):
        BatchSchedule(3, 4, 0)
    with pytest.raises(UserError, match="at least 1"):
        BatchSchedule(3, 0, 0)
    with pytest.raises(UserError, match="multiple of 3"):
        BatchSchedule(100, 4, 0).ids(0, 0, 3)
