"""Time sampling: ours, an eager sampler of plain PyTorch, and that with its transformer blocks compiled.

All forms have the same weights (random ones, which cost what trained ones do), guide at every noise level and step by
Euler-Maruyama on a float64 state. First each samples from the same noise, and its latents are compared with those of
the eager sampler in the next higher precision (float32 for bf16, float64 for fp32): an error above `BOUNDS`, or with
CUDA graphs a single bit that is not the same as without, is a failure and nothing is timed. Then runs of a few steps
are timed in turn. Images per second are of 250 steps at the time per step that was measured, without decoding.

A row per case goes into <out>/sampling_<machine>.json. The plain forms are in `bench/reference_sampler.py`.
"""

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.command_line import Parser, chosen_cases, positive
from bench.goals import sampling_verdicts
from bench.kernel_rows import COMPILED, EAGER
from bench.machine import ROOT, machine_facts, source_facts, version_facts
from bench.reference_sampler import PlainSiT, reference_sampler
from bench.result_file import write_rows
from bench.timing import time_interleaved
from sendvae_fast.errors import UserError
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.ops import philox
from sendvae_fast.sampling.generate import LatentSampler, tensor_cores
from sendvae_fast.sampling.labels import sample_labels
from sendvae_fast.sampling.samplers import initial_noise
from sendvae_fast.sampling.settings import GenerateConfig, SamplerConfig

OURS, NO_GRAPHS = "ours", "ours, no graphs"
SCALE, SEED, NUM_CLASSES = 2.5, 0, 1000
PUBLISHED_STEPS = 250
BOUNDS = {"bf16": 2e-2, "fp32": 1e-4}
"""Root mean square error of latents, relative to theirs. A wrong scale, label or step is off by 0.1 and more."""


@dataclass(frozen=True)
class SamplingCase:
    """A generator and how much of it is timed."""

    preset: str
    precision: Literal["tf32", "fp32", "bf16"]
    batch_size: int
    num_steps: int
    latent: tuple[int, int] = (32, 16)
    """Channels and size: f16d32 at 256 px."""

    @property
    def name(self) -> str:
        return f"{self.preset}, {self.precision}, batch {self.batch_size}"

    def generator(self, device: torch.device) -> SiT:
        """Random weights under which latents depend on all that goes in: labels, times and noise."""
        channels, size = self.latent
        torch.manual_seed(SEED)
        with device:
            sit = SiT(SiTConfig.preset(
                self.preset, latent_channels=channels, latent_size=size, num_classes=NUM_CLASSES
            ))  # fmt: skip
            for parameter in sit.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            torch.nn.init.normal_(sit.y_embedder.embedding_table.weight)
        return sit.eval()


CASES = {
    "cuda": (SamplingCase("SiT-XL/1", "bf16", 32, 20), SamplingCase("SiT-XL/1", "bf16", 128, 20)),
    "cpu": (SamplingCase("SiT-S/1", "bf16", 2, 4), SamplingCase("SiT-S/1", "fp32", 2, 4)),
}
SECONDS = 10.0


def main(arguments: list[str]) -> int:
    """The verb; 1 if a case failed."""
    parser = Parser("sampling", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=positive, help="CPU threads, default: the cores this process may use")
    parser.add_argument("--quick", action="store_true", help="the first case only, without torch.compile")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="these cases, by name")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    threads = options.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    machine = machine_facts(device)
    facts = {"device": device.type, "machine": machine, "threads": threads, "versions": version_facts()}
    facts |= source_facts()
    rows = []
    cases = [(case.name, case) for case in CASES[device.type]]
    for case in chosen_cases(cases, options.cases, quick=options.quick):
        rows.append({**measured_row(case, device, compile=not options.quick), **facts})
        print(summary(rows[-1]), flush=True)
        # After each row, so that nothing is lost when this is stopped.
        path = write_rows(options.out, "sampling", machine["name"], rows, itemgetter("case"))
    print("written:", path)
    return 1 if any("error" in row for row in rows) else 0


def measured_row(case: SamplingCase, device: torch.device, *, compile: bool) -> dict[str, Any]:
    """Check and time a case."""
    forms, peaks = {}, {}
    bench = Bench(case, device)
    for name, form in bench.forms(compile=compile):
        peaks[name] = bench.peak_bytes(form)
        forms[name] = form
    errors = bench.errors(forms)
    row = {
        "case": case.name, "batch_size": case.batch_size, "num_steps": case.num_steps,
        "forms": {name: {"error": errors[name], "peak_bytes": peaks[name]} for name in forms},
    }  # fmt: skip
    bound = BOUNDS[case.precision]
    if wrong := {name: error for name, error in errors.items() if not error <= bound}:  # NaN fails too
        said = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        return {**row, "error": f"latents are not the eager sampler's: error {said}, allowed {bound:.0e}"}
    if NO_GRAPHS in forms and not torch.equal(forms[OURS].draw(), forms[NO_GRAPHS].draw()):
        return {**row, "error": "latents with and without CUDA graphs are not the same"}
    calls = {name: lambda _, form=form: form.draw() for name, form in forms.items()}
    for name, timing in time_interleaved(device, calls, 1, SECONDS, sample_s=1e-3).items():
        step_ms = {"step_ms": timing.median_us, "q1_ms": timing.q1_us, "q3_ms": timing.q3_us}
        row["forms"][name] |= {key: value / 1e3 / case.num_steps for key, value in step_ms.items()}
        row["forms"][name]["img_per_s"] = 1e3 * case.batch_size / PUBLISHED_STEPS / row["forms"][name]["step_ms"]
    return row


@dataclass(frozen=True)
class Form:
    """A way of sampling the case's batch."""

    draw: Callable[[], Tensor]
    """As it is timed."""
    checked: Callable[[], Tensor]
    """From the same noise as every other form."""
    weight_bytes: int


class Bench:
    """A case's generator, labels and noise."""

    def __init__(self, case: SamplingCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.sit = case.generator(device)
        self.ids = torch.arange(case.batch_size, device=device)
        self.labels = sample_labels(SEED, self.ids, NUM_CLASSES, "random")
        channels, size = case.latent
        self.shape = (channels, size, size)
        self.z = initial_noise(SEED, self.ids, self.shape)

    def forms(self, *, compile: bool) -> Iterator[tuple[str, Form]]:
        """Every form, made when its turn comes."""
        yield EAGER, self.plain(PlainSiT(self.sit))
        if compile:
            yield COMPILED, self.plain(PlainSiT(self.sit, compile=True))
        yield OURS, self.ours(cuda_graphs=True)
        if self.device.type == "cuda":
            yield NO_GRAPHS, self.ours(cuda_graphs=False)

    def plain(self, network: PlainSiT) -> Form:
        autocast = self.case.precision == "bf16"
        return Form(
            draw=lambda: self.sample_plainly(network, self.z, None, autocast),
            checked=lambda: self.sample_plainly(network, self.z, self.noise, autocast),
            weight_bytes=sum(weight.nbytes for weight in self.sit.parameters()),
        )

    def ours(self, *, cuda_graphs: bool) -> Form:
        config = GenerateConfig(
            guidance_scale=SCALE, guidance_interval=(0.0, 1.0), seed=SEED, precision=self.case.precision,
            cuda_graphs=cuda_graphs, sampler=SamplerConfig(num_steps=self.case.num_steps),
        )  # fmt: skip
        sampler = LatentSampler(self.sit, config, self.device)
        bytes_per_weight = torch.bfloat16.itemsize if config.precision == "bf16" else torch.float32.itemsize

        def draw() -> Tensor:
            return sampler(self.ids)[1]

        return Form(draw, draw, sum(weight.numel() for weight in self.sit.parameters()) * bytes_per_weight)

    def sample_plainly(
        self, network: PlainSiT, z: Tensor, noise: Callable[[int], Tensor] | None, autocast: bool
    ) -> Tensor:
        return reference_sampler(
            network, z, self.labels, guidance_scale=SCALE, num_steps=self.case.num_steps, autocast=autocast,
            noise=noise,
        )  # fmt: skip

    def noise(self, step: int) -> Tensor:
        """The noise that our sampler adds in a step."""
        key = philox.make_key(SEED, step, self.device)
        return philox.normal(key, philox.Stream.SAMPLER_STEP, self.ids, self.shape)

    def errors(self, forms: dict[str, Form]) -> dict[str, float]:
        """Each form's root mean square distance from the truth, relative to the truth's size."""
        exact = torch.float32 if self.case.precision == "bf16" else torch.float64
        network = PlainSiT(self.sit if exact == torch.float32 else copy.deepcopy(self.sit).to(exact))
        with tensor_cores(False):
            truth = self.sample_plainly(network, self.z.to(exact), self.noise, autocast=False).double()
        return {name: ((form.checked().double() - truth).norm() / truth.norm()).item() for name, form in forms.items()}

    def peak_bytes(self, form: Form) -> int | None:
        """Memory on a GPU at the most in a first run, the form's weights included; unknown on a CPU."""
        if self.device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        form.draw()
        return torch.cuda.max_memory_allocated() - before + form.weight_bytes


def summary(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    lines = [row["case"]]
    for name, result in row["forms"].items():
        timing = f", {result['step_ms']:.2f} ms a step, {result['img_per_s']:.3g} img/s" if "step_ms" in result else ""
        peak = f", {result['peak_bytes'] / 2**30:.1f} GiB" if result["peak_bytes"] else ""
        lines.append(f"{name}: error {result['error']:.1e}{timing}{peak}")
    return "\n  ".join([*lines, *sampling_verdicts(row), *([f"FAILED {row['error']}"] if "error" in row else [])])
