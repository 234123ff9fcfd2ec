"""A plan in words: a page of one plan, a Markdown table of many, and what both assume."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sendvae_fast.plan.memory import CONTEXT_BYTES, SLACK_SHARE
from sendvae_fast.plan.plan import EPOCHS, Plan
from sendvae_fast.plan.settings import PlanConfig
from sendvae_fast.train.run_words import count_words

GIB = 2**30
PARTS = {
    "weights": "weights",
    "frozen": "frozen networks",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "ema": "EMA",
    "activations": "activations",
    "buffers": "buffers of the engine",
    "slack": "allocator's slack",
}


def plan_words(plan: Plan, config: PlanConfig) -> str:
    """One plan, and its assumptions."""
    batch = f"{plan.global_batch:,} pictures a step = {plan.gpus:,} GPUs x {plan.pictures_at_once:,} at once"
    if plan.accumulation_steps > 1:
        batch += f" x {plan.accumulation_steps} accumulated"
    parameters = ", ".join(f"{count_words(count).strip()} {name}" for name, count in plan.num_parameters.items())
    lines = [
        f"{plan.gpus:,} x {plan.gpu}, {plan.engine}, {plan.precision}",
        *_rows([("batch", batch), ("in training", parameters)]),
        "",
        f"memory of a GPU: {_gib(plan.memory.total)} of {_gib(plan.gpu_bytes)}{'' if plan.fits else ': DOES NOT FIT'}",
        *_rows((words, _gib(getattr(plan.memory, name))) for name, words in PARTS.items()),
        *_rows([("at most", largest_words(plan))]),
    ]
    if plan.flops_per_image is not None:
        total = sum(plan.flops_per_image.values())
        lines += ["", f"arithmetic: {count_words(total)}FLOP an image"]
        lines += _rows(
            (name, f"{count_words(count)}FLOP ({count / total:.0%})") for name, count in plan.flops_per_image.items()
        )
    return "\n".join([*lines, *_time_words(plan), "", *assumptions(config)])


def _time_words(plan: Plan) -> list[str]:
    """Speed, lengths and disk."""
    disk = [("latents", f"{plan.latent_bytes / 1e9:.1f} GB in bfloat16 without flips, of {plan.num_images:,} pictures")]
    time = plan.time
    if time is None or plan.images_per_s is None or plan.read_bytes_per_s is None:
        return ["", "time: not known for this precision", *_rows(disk)]
    exchange = f"{time.exchange_s * 1e3:.1f} ms, of which {time.exposed_s * 1e3:.1f} ms are waited for"
    speed = f"{plan.images_per_s:,.0f} img/s, {plan.images_per_s / plan.gpus:,.0f} a GPU"
    lengths = [(f"{epochs} epochs", plan.steps_of(epochs)) for epochs in EPOCHS]
    return [
        "",
        f"time of a step: {time.total_s * 1e3:.1f} ms",
        *_rows(
            [
                ("arithmetic", f"{time.arithmetic_s * 1e3:.1f} ms"),
                ("optimizer", f"{time.optimizer_s * 1e3:.1f} ms"),
                ("exchange", exchange),
                ("speed", speed),
                ("reading", f"{plan.read_bytes_per_s / 1e6:,.0f} MB/s"),
            ]
        ),
        "",
        "length",
        *_rows([*((name, _length(plan, steps)) for name, steps in [("this run", plan.steps), *lengths]), *disk]),
    ]


def _length(plan: Plan, steps: int) -> str:
    hours, cost = plan.hours(steps), plan.cost(steps)
    assert hours is not None
    words = f"{steps:,} steps, {_amount(hours)} h, {_amount(hours * plan.gpus)} GPU-hours"
    return words if cost is None else f"{words}, {cost:,.0f} at {plan.price:g} a GPU-hour"


def largest_words(plan: Plan) -> str:
    """How many pictures at once fit."""
    if plan.largest_at_once is None:
        return "not one picture at once fits"
    return f"{plan.largest_at_once:,} pictures at once fit"


def sweep_words(plans: Sequence[Plan], config: PlanConfig) -> str:
    """A Markdown table of plans of one run on several numbers of GPUs, and its assumptions."""
    first = plans[0]
    heads = ["GPUs", "at once", "accumulated", "GiB a GPU", "step, ms", "waited for, ms", "img/s", "of linear"]
    heads += [f"{epochs} epochs, h" for epochs in EPOCHS] + [f"{EPOCHS[0]} epochs, GPU-h"]
    heads += [] if first.price is None else [f"{EPOCHS[0]} epochs, cost"]
    heads += ["read, MB/s"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---:|' * len(heads)}"]
    lines += [f"| {' | '.join(_cells(plan, first))} |" for plan in plans]
    parameters = sum(first.num_parameters.values())
    about = (
        f"{first.gpu}, {first.engine}, {first.precision}, {first.global_batch:,} pictures a step, "
        f"{count_words(parameters).strip()} parameters in training"
    )
    if first.flops_per_image is not None:
        about += f", {count_words(sum(first.flops_per_image.values()))}FLOP an image"
    return "\n".join([f"{about}:", "", *lines, "", *assumptions(config)])


def _cells(plan: Plan, first: Plan) -> list[str]:
    memory = f"{plan.memory.total / GIB:.1f}" + ("" if plan.fits else " (too much)")
    cells = [f"{plan.gpus:,}", f"{plan.pictures_at_once}", f"{plan.accumulation_steps}", memory]
    if plan.time is None or plan.images_per_s is None or plan.read_bytes_per_s is None or first.images_per_s is None:
        return cells + ["–"] * (7 if plan.price is None else 8)
    linear = plan.images_per_s / plan.gpus / (first.images_per_s / first.gpus)
    hours = {epochs: plan.hours(plan.steps_of(epochs)) or 0.0 for epochs in EPOCHS}
    cells += [f"{plan.time.total_s * 1e3:,.1f}", f"{plan.time.exposed_s * 1e3:,.1f}", f"{plan.images_per_s:,.0f}"]
    cells += [f"{linear:.0%}", *map(_amount, hours.values()), _amount(hours[EPOCHS[0]] * plan.gpus)]
    if plan.price is not None:
        cells.append(f"{plan.cost(plan.steps_of(EPOCHS[0])):,.0f}")
    return [*cells, f"{plan.read_bytes_per_s / 1e6:,.0f}"]


def assumptions(config: PlanConfig) -> list[str]:
    """What a plan takes for granted."""
    gpu = config.kind
    arithmetic = f"{config.mfu:.0%} of {gpu.name}'s {gpu.flops_per_s / 1e12:g} TFLOP/s (--mfu)"
    link, network = f"{gpu.link_bytes_per_s / 1e9:.0f} GB/s", f"{gpu.network_bits_per_s / 1e9:.0f} Gbit/s"
    reached = f"{config.link_share:.0%} (--link_share) of {gpu.memory_bytes_per_s / 1e12:.2f} TB/s of memory, {link}"
    slack = f"{SLACK_SHARE:.0%} of the tensors' memory and {CONTEXT_BYTES / 1e9:.1f} GB"
    return [
        "Assumed, not measured:",
        f"- arithmetic at {arithmetic}, however few pictures a GPU has at once",
        f"- {reached} between the {config.gpus_per_node} GPUs of a node, {network} a GPU between nodes",
        "- rings, in nodes first; DDP hides its exchange behind the last backward pass, DeepSpeed as set here nothing",
        f"- {slack} for the allocator, CUDA and NCCL",
        "- no time for the loader, checkpoints, previews, evaluations, latencies and stragglers; none of their memory",
    ]


def _rows(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"  {name:28}{words}" for name, words in rows]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _amount(value: float) -> str:
    """Three digits and no more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
