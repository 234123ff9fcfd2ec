"""The model of a kernel's time against closed forms: occupancy, queues, the L2 cache, tables beside measurements."""

import dataclasses
import json

import pytest

from bench import goals, kernels, predicted_table
from bench.kernel_rows import COPY, FORWARD
from bench.machine import ROOT
from bench.prediction import cubin, h200
from bench.prediction.cache import L2Cache, Touch
from bench.prediction.model import WarpWork, copy_seconds, predict, throughput
from bench.prediction.occupancy import resident_blocks
from bench.prediction.rows import FILE, write
from bench.prediction.tensors import Tensors
from sendvae_fast.errors import UserError


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 32, 0, 8),  # all 64 warps
        (256, 33, 0, 6),  # 40 registers are given: 51 warps
        (256, 128, 0, 2),
        (96, 127, 0, 5),  # 16 warps of 128 registers, three to a block
        (32, 16, 0, 32),  # as many as there are places for blocks
        (128, 32, 100 << 10, 2),
        (1024, 128, 0, 0),  # more registers than there are
    ],
)
def test_blocks_at_once(threads, registers, shared, blocks):
    assert resident_blocks(threads, registers, shared) == blocks


def test_throughput_of_closed_networks():
    assert throughput([3.0], 7.0, 1) == [pytest.approx(1 / 10)]
    assert throughput([4.0], 0.0, 5) == pytest.approx([1 / 4] * 5), "one station alone is always busy"
    equal = [customers / (customers + 1) / 4.0 for customers in range(1, 6)]
    assert throughput([4.0, 4.0], 0.0, 5) == pytest.approx(equal)
    rates = throughput([1.0, 2.5, 0.5], 100.0, 400)
    assert rates == pytest.approx(sorted(rates)) and rates[-1] == pytest.approx(1 / 2.5, rel=1e-3)
    assert rates[9] == pytest.approx(10 / 104, rel=0.1), "few customers: Little's law"


def test_bounds_of_a_launch():
    """A kernel that only moves bytes is as fast as a copy; one block takes as long as a warp alone."""
    bytes_moved = 1 << 30
    blocks = 132 * 64
    mover = WarpWork(scheduler=40, load_store=40, alone=600, memory_bytes=bytes_moved / blocks / 8, l2_bytes=0)
    time = predict(mover, 8, 8, blocks)
    assert time.bound == "memory" and time.memory_s == pytest.approx(copy_seconds(bytes_moved) - h200.LAUNCH_S)
    assert time.memory_s < time.seconds - h200.LAUNCH_S < 1.1 * time.memory_s
    alone = predict(WarpWork(scheduler=100, load_store=1, alone=5000, memory_bytes=0, l2_bytes=0), 1, 16, 1)
    assert alone.seconds == pytest.approx(5001 / h200.CLOCK_HZ + h200.LAUNCH_S, rel=1e-3)
    worker = WarpWork(scheduler=2000, load_store=10, alone=2500, memory_bytes=0, l2_bytes=0)
    busy = predict(worker, 8, 8, blocks)
    issue_s = 2000 * blocks * 8 / (132 * 4) / h200.CLOCK_HZ
    assert busy.bound == "issue" and busy.issue_s == pytest.approx(issue_s) and busy.seconds > busy.issue_s
    joining = predict(dataclasses.replace(worker, last_block=990.0), 8, 8, blocks)
    assert joining.seconds - busy.seconds == pytest.approx(990 / h200.CLOCK_HZ), "alone, at the end"
    few = predict(worker, 8, 1, blocks)
    assert few.seconds > busy.seconds and few.latency_s == pytest.approx(2500 * blocks / 132 / h200.CLOCK_HZ)


def test_l2_cache_keeps_what_was_touched_last():
    def read(tensor: int, size: float, backward: bool = False) -> list[Touch]:
        return [Touch(tensor, size, is_write=False, backward=backward)]

    cache = L2Cache(100.0)
    assert cache.launch(read(1, 60.0)) == 0
    assert cache.launch(read(1, 60.0)) == 60, "all of it was kept"
    assert cache.launch(read(2, 70.0)) == 0
    assert cache.launch(read(1, 60.0, backward=True)) == 30, "of the first, what the second left"
    large = L2Cache(100.0)
    large.launch(read(1, 400.0))
    assert large.launch(read(1, 400.0)) == 0, "the same way round, each part is driven out before its turn"
    assert large.launch(read(1, 400.0, backward=True)) == 100
    writing = L2Cache(100.0)
    writing.launch([Touch(1, 150.0, False, False), Touch(2, 50.0, True, False)])
    assert writing.launch([Touch(2, 50.0, True, False)]) == 0, "writes are no reads"
    assert writing.launch(read(2, 50.0)) == 50


def test_pointers_are_known_by_their_tensors():
    tensors = Tensors([(1000, 64), (1016, 8), (2000, 32), (1040, 100), (3000, 0)])
    assert tensors.sizes == {1000: 140, 2000: 32} and tensors.at(1139) == 1000 and tensors.at(1140) is None
    pointer, number = (2008).to_bytes(8, "little").hex(), (7).to_bytes(4, "little").hex()
    words, addresses = tensors.without_addresses([pointer + number, pointer])
    assert words == [["tensor 0 + 8", number], ["tensor 0 + 8"]] and addresses == [2000]


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    """Each failure before any work: one line that says what to do."""
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no_nvcc"))
    with pytest.raises(UserError, match="nvcc was not found"):
        cubin.kernels_of(ROOT / "csrc" / "global_norm" / "global_norm_cuda.cu")
    with pytest.raises(UserError, match="no predictions of attention; there are adaln, "):
        kernels.main(["--predict", "--ops", "attention"])
    with pytest.raises(UserError, match="--predict measures nothing"):
        kernels.main(["--predict", "--quick"])


def predicted_row(**changes) -> dict:
    kernel = dict.fromkeys(
        ("us", "memory_us", "issue_us", "load_store_us", "latency_us", "registers", "spill_bytes", "occupancy",
         "instructions", "memory_bytes", "l2_bytes", "sector_bytes", "coalescing", "bank_conflicts"), 0,
    )  # fmt: skip
    kernel |= {"name": "forward_kernel<BFloat16>", "us": 90.0, "blocks": 4, "threads": 64, "instructions": 800}
    return {
        "op": "cosine_align", "case": "tiny", "pass": FORWARD, "bytes": 1 << 30, "us": 100.0, "copy_us": 80.0,
        "of_copy": 0.8, "kernels": [kernel], "others": [{"name": "mean", "bytes": 4, "us": 1.0}], "commit": "0" * 40,
        "clean": True, "date": "2026-01-02", **changes,
    }  # fmt: skip


def test_predictions_are_marked_and_compared_with_measurements(tmp_path):
    """The model's error appears with results of an H200 (here made up), and of no other machine."""
    assert predicted_table.predicted_tables(tmp_path) == ""
    write(tmp_path / FILE, [predicted_row(), predicted_row(op="adaln")])
    write(tmp_path / FILE, [predicted_row(us=200.0, of_copy=0.4)])  # in the place of the op's first row
    text = predicted_table.predicted_tables(tmp_path)
    assert (
        "predicted, not measured" in text and "| cosine_align | tiny | forward | 200 µs | 80.0 µs | 40% | 90% |" in text
    )
    assert "model's error" not in text and "| 100 |" in text, "800 instructions of 8 warps"

    def result(machine: str) -> list[dict]:
        forms = {"cuda": {"median_us": 1.0, "graph": {"median_us": 160.0}}}
        return [{"op": "cosine_align", "case": "tiny", "pass": FORWARD, "forms": forms, "machine": {"name": machine}}]

    (tmp_path / "kernels_a.json").write_text(json.dumps(result("NVIDIA A100")))
    assert "model's error" not in predicted_table.predicted_tables(tmp_path)
    (tmp_path / "kernels_b.json").write_text(json.dumps(result("NVIDIA H200")))
    text = predicted_table.predicted_tables(tmp_path)
    assert "| 160 µs | +25% |" in text and "| adaln | tiny | forward |" in text


def test_goals_against_a_copy_are_for_cases_that_move_enough():
    (goal,) = (goal for goal in goals.GOALS["group_norm_silu", "cuda"] if goal.against == COPY)
    row = {"op": "group_norm_silu", "pass": FORWARD, "bytes": goal.from_bytes}
    assert goal.is_for(row) and not goal.is_for({**row, "bytes": goal.from_bytes - 1})
