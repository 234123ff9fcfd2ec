"""Made-up training runs and results on disk, lifelike enough to look at."""

import json
import math

import numpy as np
import yaml
from PIL import Image
from scipy.ndimage import gaussian_filter

from sendvae_fast.evaluation.result import Result, append_results

ATTRIBUTES = (
    "is_round",
    "is_red",
    "is_large",
    "left_half",
    "upper_half",
    "striped",
    "dotted",
    "dark_background",
    "two_objects",
    "tilted",
    "has_border",
    "warm_light",
    "overlapping",
    "small_detail",
    "high_contrast",
    "has_shadow",
)
ENVIRONMENT = {
    "sendvae_fast": "0.1.0",
    "git_commit": "0123abc",
    "command": "sendvae demo",
    "python": "3.11.7",
    "packages": {"torch": "2.15.0", "deepspeed": "0.19.8"},
    "gpus": [],
    "cpu_cores": 2,
    "world_size": 1,
}


def scenes(num, size, rng):
    """Pictures of discs and boxes on gradients: uint8 [num, size, size, 3]."""
    y, x = np.mgrid[:size, :size] / size
    pictures = []
    for _ in range(num):
        ground = rng.uniform(30, 220, 3) + (y * rng.uniform(-40, 40) + x * rng.uniform(-40, 40))[..., None]
        cx, cy, radius = *rng.uniform(0.3, 0.7, 2), rng.uniform(0.12, 0.3)
        disc, box = np.hypot(x - cx, y - cy) < radius, np.maximum(abs(x - cx), abs(y - cy)) < radius
        inside = (disc if rng.random() < 0.5 else box)[..., None]
        stripes = 1 + 0.25 * np.sign(np.sin((x + y) * rng.integers(20, 60)))[..., None] * (rng.random() < 0.5)
        pictures.append(np.where(inside, rng.uniform(20, 255, 3) * stripes, ground))
    return np.clip(pictures, 0, 255).astype(np.uint8)


def write_sheet(path, pictures, columns):
    """uint8 [num, H, W, 3] as one PNG, row by row."""
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def result(metric, value, **fields):
    """A result as `sendvae evaluate` records it."""
    return Result(metric=metric, value=value, protocol="made up", counts={"pictures": 2000}, **fields)


def blurred(pictures, sigma):
    return gaussian_filter(pictures, (0, sigma, sigma, 0))


def write_run(path, stage, rng, num_steps=1500, final=0.2):
    """A run directory of either stage, with a metrics.jsonl as the metrics logger writes it."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "seed": 0,
                "data": {"root": "scenes", "image_size": 64, "global_batch": 16},
                "optimizer": {"lr": 5e-4},
                "loop": {"num_steps": num_steps},
            },
            sort_keys=False,
        )
    )
    (path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    names = {
        "autoencoder": ("reconstruction", "kl", "align", "gan", "discriminator"),
        "generator": ("velocity", "align"),
    }[stage]
    lines, time_s = [], 1_700_000_000.0
    for step in range(10, num_steps + 1, 10):
        time_s += rng.uniform(0.9, 1.3)
        decay = math.exp(-4 * step / num_steps)
        values = {name: (final + decay) * (1 + 0.04 * rng.normal()) for name in names}
        if "kl" in values:
            values["kl"] = 2000 * (decay + 0.01) * (1 + 0.02 * rng.normal())
        values["loss"] = values[names[0]] + 0.5 * values["align"]
        entry = {"step": step, "time_s": round(time_s, 3), **values}
        lines.append(json.dumps(entry | {"grad_norm": 0.3 + decay, "img_per_s": 150 + 8 * rng.normal()}))
    # NaNs are logged as null, and a crash may cut off the last line
    lines.insert(3, json.dumps({"step": 35, "time_s": 1_700_000_004.0, "loss": None}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 1510, "lo')
    pictures = scenes(8, 64, rng)
    for step in (500, 1000, 1500):
        if stage == "autoencoder":
            sheet = np.concatenate([pictures, blurred(pictures, 1500 / step)])
            write_sheet(path / "samples" / f"reconstruction_{step:08d}.png", sheet, columns=8)
        else:
            write_sheet(path / "samples" / f"samples_{step:08d}.png", blurred(scenes(16, 64, rng), 1500 / step), 4)
    return path


def write_comparison(root, aligned_gain=0.05):
    """A demo's folder: three variants, three seeds. aligned_gain: what alignment adds to F1."""
    rng = np.random.default_rng(0)
    originals = scenes(8, 64, rng)
    write_sheet(root / "originals.png", originals, columns=8)
    described = {
        "Plain VAE": "the autoencoder before fine-tuning.",
        "Control": "fine-tuned for as many steps, without alignment.",
        "Send-VAE": "fine-tuned with the alignment loss.",
    }
    variants = []
    for index, (name, description) in enumerate(described.items()):
        folder = f"variant_{index}"
        gain = aligned_gain if name == "Send-VAE" else 0.0
        write_sheet(root / folder / "reconstructions.png", blurred(originals, 1.3 - 0.2 * index), columns=8)
        write_sheet(root / folder / "samples.png", blurred(scenes(16, 64, rng), 2 - 0.4 * index), columns=4)
        runs = [f"{folder}/vae", f"{folder}/sit"]
        for run, stage in zip(runs, ("autoencoder", "generator"), strict=True):
            write_run(root / run, stage, rng, final=0.25 - 0.03 * index)
        for seed in range(3):
            f1 = {name: 0.2 + 0.04 * rank + gain + 0.01 * rng.random() for rank, name in enumerate(ATTRIBUTES)}
            values = {"rfrechet_demo": [30.1, 29.2, 31.0][seed] - index, "psnr": [19.4, 19.5, 19.3][seed]}
            values |= {"ssim": 0.7, "attribute_f1": sum(f1.values()) / len(f1)}
            values["frechet_demo"] = [100, 103, 98][seed] - 200 * gain
            details = {"attribute_f1": {"f1": f1}}
            results = [result(metric, value, details=details.get(metric, {})) for metric, value in values.items()]
            append_results(root / folder / f"{seed}.jsonl", results)
        variants.append(
            {
                "name": name,
                "description": description,
                "runs": runs,
                "reconstructions": f"{folder}/reconstructions.png",
                "samples": f"{folder}/samples.png",
                "evaluations": [f"{folder}/{seed}.jsonl" for seed in range(3)],
            }
        )
    (root / "results.json").write_text(
        json.dumps(
            {
                "title": "Send-VAE demo",
                "subtitle": "Synthetic scenes, 64 pixels, 3 seeds",
                "candidate": "Send-VAE",
                "control": "Control",
                "originals": "originals.png",
                "variants": variants,
                "notes": [
                    "Distances are on features of the package's own small network: compare them with each other."
                ],
            }
        )
    )
    return root
