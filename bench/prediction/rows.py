"""Predictions of benchmark cases, as rows like those of measurements, in a file of their own."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from bench.machine import ROOT, source_facts
from bench.prediction import h200
from bench.prediction.cache import L2Cache
from bench.prediction.counts import Counts, count
from bench.prediction.cubin import Kernel, kernels_of
from bench.prediction.launches import ALSO_CALLED, Recorded, launch_of, recorded
from bench.prediction.model import copy_seconds, predict
from bench.prediction.occupancy import resident_blocks
from bench.prediction.tensors import JOINED, Tensors
from sendvae_fast.errors import UserError

MANY = 16
"""Tensors in one launch's arguments from which on they are taken as one."""
FILE = "predicted_h200.json"
FROM_MEMORY = ("center_crop",)
"""Ops whose kernels read from memory where to read next: what they do cannot be followed without its contents."""


def predicted_ops() -> list[str]:
    """The ops that have CUDA kernels whose ways are known without the contents of memory."""
    folders = sorted({path.parent.name for path in (ROOT / "csrc").glob("*/*.cu")})
    return [op for op in folders if op not in FROM_MEMORY]


def predicted_rows(op: str) -> Iterator[dict[str, Any]]:
    """A row per case and pass of an op."""
    counted = Counted()
    for record in recorded(op):
        yield predicted_row(record, counted) | source_facts()


def predicted_row(record: Recorded, counted: "Counted") -> dict[str, Any]:
    """The kernels of a case one after the other, with what the L2 cache keeps between them."""
    tensors = Tensors(record.tensors)
    kernels = op_kernels(record.op)
    cache_ = L2Cache()
    launches = []
    for launch in record.launches:
        kernel = kernels.get(launch["kernel"])
        if kernel is None:
            raise UserError(f"{record.op}: nvcc made no kernel {launch['kernel']}")
        counts, sizes = counted(launch, kernel, tensors)
        launches.append(launch_row(launch, kernel, counts, sizes, cache_))
    others = [
        {"name": name, "bytes": size, "us": micro(copy_seconds(size))} for name, size in record.others if size > 0
    ]
    seconds = sum(row["us"] for row in [*launches, *others]) / 1e6
    return {
        "op": record.op, "case": record.case, "pass": record.pass_name, "bytes": record.least_bytes,
        "us": micro(seconds), "copy_us": micro(copy_seconds(record.least_bytes)),
        "of_copy": round(copy_seconds(record.least_bytes) / seconds, 3),
        "kernels": merged(launches), "others": others,
    }  # fmt: skip


class Counted:
    """Counts of launches; those that differ in nothing but where their tensors lie are counted once."""

    def __init__(self):
        self.found: dict[str, tuple[Counts, list[int]]] = {}

    def __call__(self, launch: dict[str, Any], kernel: Kernel, tensors: Tensors) -> tuple[Counts, dict[int, int]]:
        """The counts, and the bytes of the tensors that their streams name."""
        arguments, addresses = tensors.without_addresses([text for text, _ in launch["arguments"]])
        sizes = [tensors.sizes[address] for address in addresses]
        key = json.dumps([launch["kernel"], launch["grid"], launch["block"], arguments, sizes])
        is_joined = len(addresses) > MANY
        if key not in self.found:
            self.found[key] = count(kernel, launch_of(launch, kernel), tensors, is_joined), addresses
        counts, counted_addresses = self.found[key]
        moved = dict(zip(counted_addresses, addresses, strict=True)) | {JOINED: JOINED}
        streams = {(moved[tensor], is_write): stream for (tensor, is_write), stream in counts.streams.items()}
        return replace(counts, streams=streams), {**tensors.sizes, JOINED: sum(sizes)}


def launch_row(
    launch: dict[str, Any], kernel: Kernel, counts: Counts, sizes: dict[int, int], cache_: L2Cache
) -> dict[str, Any]:
    """One launch: what it needs, what it does, and its time."""
    touches = counts.touches(sizes)
    hits = cache_.launch(touches)
    moved = sum(touch.distinct_bytes for touch in touches)
    blocks = launch["grid"][0] * launch["grid"][1] * launch["grid"][2]
    threads = launch["block"][0] * launch["block"][1] * launch["block"][2]
    resident = resident_blocks(threads, kernel.registers, kernel.shared_bytes + launch["dynamic_shared_bytes"])
    if resident == 0:
        raise UserError(f"{kernel.name}: a block of {threads} threads does not fit a multiprocessor")
    warps_per_block = -(-threads // h200.WARP)
    time = predict(counts.warp_work(moved - hits, hits), warps_per_block, resident, blocks)
    return {
        "name": kernel.name, "launches": 1, "us": micro(time.seconds), "bound": time.bound,
        "memory_us": micro(time.memory_s), "issue_us": micro(time.issue_s),
        "load_store_us": micro(time.load_store_s), "latency_us": micro(time.latency_s),
        "blocks": blocks, "threads": threads, "registers": kernel.registers, "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared_bytes + launch["dynamic_shared_bytes"],
        "occupancy": round(resident * warps_per_block / h200.MAX_WARPS, 3),
        "memory_bytes": round(moved - hits), "l2_bytes": round(hits), "sector_bytes": round(counts.sector_bytes),
        "coalescing": round(counts.coalescing, 3), "bank_conflicts": round(counts.bank_conflicts),
        "instructions": round(counts.instructions),
        "per_warp": {unit: round(n / counts.warps, 1) for unit, n in counts.issued.most_common()},
        "undecided_per_warp": round(counts.undecided / counts.warps, 1),
        "unknown_accesses_per_warp": round(counts.unknown_accesses / counts.warps, 1),
    }  # fmt: skip


BOUNDS = ("memory", "issue", "load_store", "latency")
SUMS = ("launches", "us", "memory_us", "issue_us", "load_store_us", "latency_us", "blocks", "memory_bytes", "l2_bytes",
        "sector_bytes", "bank_conflicts", "instructions")  # fmt: skip


def merged(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Launches of one kernel as one entry: sums, and the rest as in the longest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in launches:
        found.setdefault(row["name"], []).append(row)
    rows = []
    for group in found.values():
        longest = max(group, key=lambda row: row["us"])
        rows.append(longest | {name: round(sum(row[name] for row in group), 2) for name in SUMS})
    return rows


@cache
def op_kernels(op: str) -> dict[str, Kernel]:
    """The kernels that an op's cases launch, by name."""
    sources = [path for name in (op, *ALSO_CALLED.get(op, ())) for path in (ROOT / "csrc" / name).glob("*.cu")]
    return {kernel.name: kernel for source in sorted(sources) for kernel in kernels_of(source)}


def micro(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def summary(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    times = f"{row['us']:.1f} us, a copy {row['copy_us']:.1f} us: {row['of_copy']:.0%} of copy"
    lines = [f"{row['op']}, {row['case']}, {row['pass']}: {times}"]
    for kernel in row["kernels"]:
        warps = kernel["blocks"] * -(-kernel["threads"] // h200.WARP)
        bounds = ", ".join(
            f"{name} {kernel[f'{name}_us']:.1f}" for name in ("memory", "issue", "load_store", "latency")
        )
        lines.append(
            f"  {kernel['name']}: {kernel['us']:.1f} us, alone {bounds}; {kernel['registers']} registers, occupancy "
            f"{kernel['occupancy']:.0%}, {kernel['instructions'] / warps:.0f} instructions a warp, "
            f"{kernel['memory_bytes'] / 1e6:.1f} MB from memory, {kernel['l2_bytes'] / 1e6:.1f} from L2, "
            f"coalescing {kernel['coalescing']:.0%}, {kernel['bank_conflicts']} bank conflicts"
            + ("" if kernel["unknown_accesses_per_warp"] == 0 else ", SOME ADDRESSES UNKNOWN")
        )
    lines += [f"  PyTorch's {other['name']}: {other['us']:.1f} us" for other in row["others"]]
    return "\n".join(lines)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows in the file, in place of those of the same ops."""
    ops = {row["op"] for row in rows}
    kept = [row for row in json.loads(path.read_text()) if row["op"] not in ops] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in [*kept, *rows]) + "\n]\n")
