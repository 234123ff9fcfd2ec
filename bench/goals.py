"""The goals of the ops, as ratios of two times measured in one run, and whether a row reaches them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.kernel_rows import COMPILED, COPY, EAGER, EAGER_NCHW, FORWARD, WITH_BACKWARD
from bench.step_names import COMPILED as STEP_COMPILED
from bench.step_names import OUR_FORMS

BOTH = (FORWARD, WITH_BACKWARD)


@dataclass(frozen=True)
class Goal:
    """time(against) / time(ours) is to be `at_least` this in these passes."""

    against: str
    at_least: float
    passes: tuple[str, ...] = BOTH
    from_bytes: int = 0
    """Bytes that a case has to move for the goal to be for it: a copy of less takes hardly longer than its launch."""

    def is_for(self, row: dict[str, Any]) -> bool:
        return row["pass"] in self.passes and row["bytes"] >= self.from_bytes


MANY_BYTES = 3 * 32 * 2**20
"""What a normalisation moves of a map of 32 MB, the least that is not read again from the L2 cache."""
NOT_SLOWER = (Goal(EAGER, 1.0),)
GOALS: dict[tuple[str, str], tuple[Goal, ...]] = {
    **{(op, "cpu"): (Goal(EAGER, 1.5),) for op in ("noise_inject", "cosine_align", "adamw_ema", "group_norm_silu")},
    # On an H200, in bf16. Issuing the instructions that draw two normal numbers for each element takes longer than a
    # copy of all that the op reads and writes; stage 1's latents are too few for a copy to be a yardstick at all.
    ("noise_inject", "cuda"): (Goal(COPY, 0.5, from_bytes=16 * 2**20), Goal(EAGER, 4.0)),
    ("cosine_align", "cuda"): (Goal(COPY, 0.9), Goal(EAGER, 4.0), Goal(COMPILED, 1.3)),
    ("group_norm_silu", "cuda"): (
        # In both layouts: PyTorch's own GroupNorm is slower channels-last than it is in NCHW.
        Goal(COPY, 0.85, from_bytes=MANY_BYTES), Goal(EAGER, 1.4), Goal(EAGER_NCHW, 1.4),
        Goal(COMPILED, 1.1, (WITH_BACKWARD,)),
    ),
    # The backward pass is what counts: gradients of x, branch, gate, shift and scale from one reading.
    ("adaln", "cuda"): (
        Goal(COPY, 0.85), Goal(COMPILED, 1.0, (FORWARD,)), Goal(COMPILED, 1.2, (WITH_BACKWARD,)),
    ),
    ("adamw_ema", "cuda"): (
        Goal(COPY, 0.85), Goal("fused AdamW + foreach EMA + clip", 1.15), Goal(EAGER, 2.0),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A goal and what a row reached; None where a time is missing, which is a miss."""

    goal: Goal
    ratio: float | None

    @property
    def met(self) -> bool:
        return self.ratio is not None and self.ratio >= self.goal.at_least

    def __str__(self) -> str:
        if self.goal.against == COPY:
            reached = "no time" if self.ratio is None else f"{self.ratio:.0%}"
            text = f"{reached} of copy (goal {self.goal.at_least:.0%})"
        else:
            reached = "no time" if self.ratio is None else f"{self.ratio:.2f}x"
            text = f"{reached} {self.goal.against} (goal {self.goal.at_least:.1f}x)"
        return f"{'met' if self.met else '**missed**'}: {text}"


def verdicts(row: dict[str, Any], kind: str | None) -> Iterator[Verdict]:
    """Every goal of the row's op on its device and pass; `kind` as for `median_us`."""
    for goal in GOALS.get((row["op"], row["device"]), NOT_SLOWER):
        if goal.is_for(row):
            yield Verdict(goal, ratio(row, goal.against, kind))


def ratio(row: dict[str, Any], against: str, kind: str | None) -> float | None:
    """time(against) / time(ours), ours being the backend that the op takes by itself on this device."""
    theirs, ours = (median_us(row, form, kind) for form in (against, row["chosen"]))
    return None if theirs is None or ours is None else theirs / ours


def median_us(row: dict[str, Any], form: str, kind: str | None) -> float | None:
    """Median time of a form: launched from Python with kind None, or with kind "graph" within a CUDA graph."""
    result = row["forms"].get(form, {})
    timing = result if kind is None else result.get(kind, {})
    return timing.get("median_us")


# -- what a call costs the host --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostGoal:
    """The most CPU time of a call on tensors of a few numbers: either bound will do."""

    of_eager: float
    """Times eager's."""
    us: float = 0.0
    """Microseconds."""

    def met(self, eager_us: float, ours_us: float) -> bool:
        """Whether `ours_us` is within it."""
        return ours_us <= max(self.us, self.of_eager * eager_us)

    def __str__(self) -> str:
        return f"{self.us:g} µs or eager's" if self.us else f"{self.of_eager:g}x eager's"


def host_goal(name: str) -> HostGoal:
    """The goal of a pass."""
    return HostGoal(of_eager=1.1) if name == WITH_BACKWARD else HostGoal(of_eager=1.0, us=30.0)


# -- sampling --------------------------------------------------------------------------------------------------------

SAMPLING_GOALS = {"cpu": Goal(EAGER, 1.3), "cuda": Goal(EAGER, 1.5)}
SAMPLING_IMG_PER_S = {"SiT-XL/1, bf16, batch 128": 4.2}
"""On an H200: half of what its tensor cores could do."""


def sampling_verdicts(row: dict[str, Any]) -> list[str]:
    """The verdicts on a row of `bench sampling`."""
    times = {name: result.get("step_ms") for name, result in row["forms"].items()}
    ratio = times[EAGER] / times["ours"] if times.get(EAGER) and times.get("ours") else None
    said = [str(Verdict(SAMPLING_GOALS[row["device"]], ratio))]
    if wanted := SAMPLING_IMG_PER_S.get(row["case"]):
        reached = row["forms"]["ours"].get("img_per_s", 0.0)
        said.append(f"{'met' if reached >= wanted else '**missed**'}: {reached:.2f} img/s (goal {wanted} on an H200)")
    return said


# -- evaluation ------------------------------------------------------------------------------------------------------

EVALUATION_GOAL = 1.0
"""Time of torch-fidelity's command over ours: on a CPU of all its cores, on a GPU by the clock."""


def evaluation_verdict(row: dict[str, Any]) -> str:
    """The verdict on a row of `bench evaluate`."""
    measure = "cpu_s" if row["device"] == "cpu" else "wall_s"
    reached = row["forms"]["torch-fidelity"][measure] / row["forms"]["sendvae evaluate"][measure]
    word = "met" if reached >= EVALUATION_GOAL else "**missed**"
    return f"{word}: {reached:.2f}x torch-fidelity (goal {EVALUATION_GOAL:g}x)"


# -- whole steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepGoal:
    """A goal of a training step: a ratio of times to another form or engine, or images per second."""

    stage: str
    device: str
    at_least: float
    against: str | None = None
    """A form, or an engine; None: images per second."""
    ours: str | None = None
    """An engine that is judged; None: the faster of our forms."""
    case: str = ""
    """The start of the cases' names it is for."""
    gpu: str = ""
    """The GPU it is for, by a part of its name."""
    min_batch_size: int = 0
    """Images per rank from which on it is for."""


STEP_GOALS = (
    StepGoal("vae", "cuda", 2.0, EAGER),
    StepGoal("vae", "cuda", 1.2, STEP_COMPILED),
    # 30% and 45% of an H200's 990 TFLOP/s at 1410 and 771 GFLOP per image.
    StepGoal("vae", "cuda", 211.0, gpu="H200"),
    StepGoal("sit", "cuda", 2.0, EAGER, case="SiT-XL/1"),
    StepGoal("sit", "cuda", 1.15, STEP_COMPILED, case="SiT-XL/1"),
    StepGoal("sit", "cuda", 578.0, case="SiT-XL/1", gpu="H200", min_batch_size=128),
    StepGoal("sit", "cuda", 0.95, "ddp", ours="zero1"),
    StepGoal("vae", "cpu", 1.3, EAGER),
    StepGoal("sit", "cpu", 1.3, EAGER),
    StepGoal("e2e", "cuda", 2.0, EAGER),
    StepGoal("e2e", "cuda", 175.0, gpu="H200"),  # 40% at 2252 GFLOP
    StepGoal("e2e", "cpu", 1.3, EAGER),
)


@dataclass(frozen=True)
class StepVerdict:
    """A step's goal and what a row reached."""

    goal: StepGoal
    reached: float
    form: str

    @property
    def met(self) -> bool:
        return self.reached >= self.goal.at_least

    def __str__(self) -> str:
        if self.goal.against is None:
            text = f"{self.form} {self.reached:.0f} img/s (goal {self.goal.at_least:.0f})"
        else:
            text = f"{self.form} {self.reached:.2f}x {self.goal.against} (goal {self.goal.at_least:g}x)"
        return f"{'met' if self.met else '**missed**'}: {text}"


def step_verdicts(row: dict[str, Any]) -> Iterator[StepVerdict]:
    """Every goal that the row of a step has a time for."""
    forms = row.get("engines") or row["forms"]
    for goal in STEP_GOALS:
        if (goal.stage, goal.device) != (row["stage"], row["device"]) or not row["case"].startswith(goal.case):
            continue
        if row["batch_size"] < goal.min_batch_size:
            continue
        candidates = [name for name in forms if (name == goal.ours if goal.ours else name in OUR_FORMS)]
        if not candidates or goal.gpu not in row["machine"]["name"] or goal.against not in (None, *forms):
            continue
        ours = max(candidates, key=lambda name: forms[name]["img_per_s"])
        theirs = 1.0 if goal.against is None else forms[goal.against]["img_per_s"]
        yield StepVerdict(goal, forms[ours]["img_per_s"] / theirs, ours)
