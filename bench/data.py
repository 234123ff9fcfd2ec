"""Time the data path: decoding and cropping photographs, reading latents, and a training step fed with both.

    decode    photographs to crops, by Pillow alone, Pillow with our crop, DALI (CPU, and GPU where there is one)
    latents   f16d32 latents (mean and std, bfloat16) in a shuffled order: LatentReader, and a PyTorch DataLoader over
              the same shards with 2 workers; from the page cache, and with the cache dropped before each pass
    step      a stage 1 step on photographs from a folder over the same step on one batch that is already there

All ways of doing one thing are measured in turn in one process; a row per part goes into <out>/data_<machine>.json.
"""

import io
import os
import tempfile
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from bench.command_line import Parser, positive
from bench.machine import ROOT, machine_facts, source_facts, version_facts
from bench.result_file import write_rows
from bench.timing import Timing, time_interleaved
from sendvae_fast import ops
from sendvae_fast.config import build_config, merge
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.crop import read_crop
from sendvae_fast.data.dali_decoder import DaliDecoder, import_dali
from sendvae_fast.data.decode import decode_rgb, examine
from sendvae_fast.data.latents.latent_rows import LatentReader, LatentRows
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.errors import UserError
from sendvae_fast.reading import read_yaml
from sendvae_fast.train.training_images import TrainingImages
from sendvae_fast.train.vae.settings import VAETrainConfig
from sendvae_fast.train.vae.stage import VAEStage

PARTS = ("decode", "latents", "step")
LATENT_SHAPE = (32, 16, 16)  # f16d32 at 256 px
NUM_LATENTS, SHARD_SIZE, LATENT_BATCH = 8192, 1024, 256
NUM_PHOTOGRAPHS, CROP = 32, 256


def main(arguments: list[str]) -> int:
    """The verb."""
    parser = Parser("data", __doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--photographs", type=Path, help="an ImageFolder to decode; default: textures of 500 x 375 px")
    parser.add_argument("--threads", type=positive, default=1, help="decoding and reading threads of each form")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of each part")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    machine = machine_facts(device)
    facts = {"machine": machine, "threads": options.threads, "versions": version_facts(), **source_facts()}
    measure = {"decode": decode_row, "latents": latents_row, "step": step_row}
    rows = []
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            row = measure[part](Path(folder), device, options)
        rows.append({"part": part, **row, **facts})
        for form, result in row["forms"].items():
            print(f"{part}: {form}: {result['per_s']:,.0f} {row['unit']}/s", flush=True)
    path = write_rows(options.out, "data", machine["name"], rows, itemgetter("part"))
    print("written:", path)
    return 0


def measured(calls: dict[str, Callable[[int], object]], num: int, seconds: float, unit: str) -> dict[str, Any]:
    """Time calls that each do `num` items; items per second from the median, and its quartiles."""
    for call in calls.values():
        call(0)
    timings = time_interleaved(torch.device("cpu"), calls, 1, seconds, sample_s=1e-3)
    return {"unit": unit, "forms": {name: rates(timing, num) for name, timing in timings.items()}}


def rates(timing: Timing, num: int) -> dict[str, float]:
    """A timing of `num` items as items per second."""
    return {
        "per_s": 1e6 * num / timing.median_us, "q1_per_s": 1e6 * num / timing.q3_us,
        "q3_per_s": 1e6 * num / timing.q1_us, "num_samples": timing.num_samples,
    }  # fmt: skip


# -- decode ----------------------------------------------------------------------------------------------------------


def decode_row(folder: Path, device: torch.device, options: Any) -> dict[str, Any]:
    """Photographs to crops per second; and the crop alone, from decoded pictures."""
    encoded = photographs(options.photographs)
    decoded = [decode_rgb(data) for data in encoded]
    tensors = [torch.from_numpy(np.array(image)) for image in decoded]
    calls: dict[str, Callable[[int], object]] = {
        "Pillow, Pillow's crop": lambda _: [ops.pillow_center_crop(decode_rgb(data), CROP) for data in encoded],
        "Pillow, our crop": lambda _: [read_crop(data, CROP) for data in encoded],
        "crop alone, Pillow's": lambda _: [ops.pillow_center_crop(image, CROP) for image in decoded],
        "crop alone, ours": lambda _: [ops.center_crop(tensor, CROP) for tensor in tensors],
    }
    if import_dali() is not None:
        on_cpu = DaliDecoder(CROP, options.threads, torch.device("cpu"))
        calls["DALI CPU, our crop"] = lambda _: on_cpu.crops(encoded)
        if device.type == "cuda":
            on_gpu = DaliDecoder(CROP, options.threads, device)
            calls["DALI GPU, our crop"] = lambda _: (on_gpu.crops(encoded), torch.cuda.synchronize())
    source = str(options.photographs.name) if options.photographs else "textures of 500 x 375 px"
    what = f"{len(encoded)} pictures ({source}) to {CROP} px"
    return {"what": what, **measured(calls, len(encoded), options.seconds, "img")}


def photographs(root: Path | None) -> list[bytes]:
    """Encoded ordinary JPEGs: from a folder, or rendered at ImageNet's mean size."""
    if root is None:
        return [texture(seed) for seed in range(NUM_PHOTOGRAPHS)]
    catalog = Catalog.open(root)
    ids = np.linspace(0, len(catalog) - 1, min(NUM_PHOTOGRAPHS, len(catalog)), dtype=int)
    encoded = [data for i in ids.tolist() if examine(data := catalog.read(i), catalog.names[i]).verdict == "ok"]
    if not encoded:
        raise UserError(f"{root} has no ordinary JPEGs to measure with; give other --photographs")
    return encoded


def texture(seed: int) -> bytes:
    """A JPEG with detail on every scale, of about a photograph's size in bytes."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (375 // n + 1, 500 // n + 1, 3), np.uint8)).resize((500, 375), 3)
        for n in (96, 24, 6)
    ]
    parts = zip((0.6, 0.3, 0.1), layers, strict=True)
    pixels: Any = sum(weight * np.asarray(layer, np.float32) for weight, layer in parts)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# -- latents ---------------------------------------------------------------------------------------------------------


class ShardDataset(Dataset):
    """The simple solution for comparison: rows of memory-mapped shards, by sample id."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.open = paths, None

    def __len__(self) -> int:
        return NUM_LATENTS

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.open is None:  # in the worker: the maps do not travel
            self.open = [safe_open(path, framework="pt") for path in self.paths]
        file, row = self.open[i // SHARD_SIZE], i % SHARD_SIZE
        return tuple(file.get_slice(name)[row : row + 1][0] for name in ("mean", "std"))


def latents_row(folder: Path, device: torch.device, options: Any) -> dict[str, Any]:
    """Samples per second through a whole shuffled epoch, batch by batch."""
    paths = []
    for k in range(NUM_LATENTS // SHARD_SIZE):
        paths.append(folder / f"latents_{k:05d}.safetensors")
        generator = torch.Generator().manual_seed(k)
        rows = torch.randn(2, SHARD_SIZE, *LATENT_SHAPE, generator=generator).to(torch.bfloat16)
        save_file({"mean": rows[0].clone(), "std": rows[1].clone()}, paths[-1])
    order = torch.randperm(NUM_LATENTS, generator=torch.Generator().manual_seed(0)).split(LATENT_BATCH)
    reader = LatentReader(LatentRows.of_files(paths, [("mean", "std")]), num_threads=2, read_ahead=8)
    loader = DataLoader(
        ShardDataset(paths),
        batch_sampler=[ids.tolist() for ids in order],
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=4,
    )

    def native() -> Iterator[Any]:
        return reader.read((ids, None, None) for ids in order)

    def cold(batches: Callable[[], Iterator[Any]]) -> None:
        for path in paths:
            drop_from_cache(path)
        consume(batches())

    calls: dict[str, Callable[[int], object]] = {
        "LatentReader, 2 threads": lambda _: consume(native()),
        "DataLoader, 2 workers": lambda _: consume(loader),
        "LatentReader, cold": lambda _: cold(native),
        "DataLoader, cold": lambda _: cold(lambda: iter(loader)),
    }
    what = f"{NUM_LATENTS:,} samples of mean and std {list(LATENT_SHAPE)}, bfloat16, batches of {LATENT_BATCH}"
    return {"what": what, **measured(calls, NUM_LATENTS, options.seconds, "sample")}


def consume(batches: Any) -> None:
    for _ in batches:
        pass


def drop_from_cache(path: Path) -> None:
    """Write a file out and let the system forget its pages; a network's or a disk's own cache stays."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- step ------------------------------------------------------------------------------------------------------------


def step_row(folder: Path, device: torch.device, options: Any) -> dict[str, Any]:
    """Steps of the demo's autoencoder fed by the loader (decoding every time), and on one batch again and again."""
    synth_scenes(folder / "images", 512, 64, seed=0)
    settings = {
        "run": str(folder / "run"),
        "data": {"root": str(folder / "images"), "cache_mb": 0, "num_threads": 1},
        "loop": {"num_steps": 1},
        "alignment": {"foundation": {"name": "demo"}},
    }
    base = read_yaml(ROOT / "configs" / "demo" / "vae.yaml", "restore it")
    config = build_config(VAETrainConfig, merge(base, settings), "vae.yaml")
    distributed = init_distributed()
    images = TrainingImages(config.data, 0, 1, distributed)
    stage = VAEStage(config, images, distributed)
    batches = images.batches(0)
    fixed = next(batches)
    calls: dict[str, Callable[[int], object]] = {
        "fed by the loader": lambda _: stage.train_step(0, next(batches)),
        "one batch, always there": lambda _: stage.train_step(0, fixed),
    }
    what = f"stage 1 of the demo, batches of {config.data.global_batch} JPEGs of 64 px, 1 decoding thread"
    return {"what": what, **measured(calls, config.data.global_batch, options.seconds, "img")}
