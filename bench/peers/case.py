"""What is compared: a step of a peer's and ours, and the columns, the ways in which it is run."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from bench.step_cases import StepCase

AS_SHIPPED = "as shipped"
TUNED = "with TF32, channels-last, fused AdamW"
COMPILED = "and torch.compile"
OURS, OURS_COMPILED = "ours", "ours, compiled"
COLUMNS = (AS_SHIPPED, TUNED, COMPILED, OURS, OURS_COMPILED)

Precision = Literal["fp32", "bf16", "fp16"]
Compilation = Literal["none", "shipped", "whole"]


@dataclass(frozen=True)
class Column:
    """One way of running a step."""

    name: str
    precision: Precision
    """Of autocast; weights and optimizers are float32 in all."""
    ours: bool = False
    tuned: bool = False
    """A peer's: TF32 in products and convolutions, channels-last networks and pictures, AdamW in one kernel."""
    compile: Compilation = "none"
    """What torch.compile is given: nothing, even where the peer asks for it; what the peer gives it; all networks."""


TRUTH = Column("the peer's in float32, not compiled", "fp32")
"""What every column's first step is compared with."""
OURS_IN_FP32 = Column("ours in float32", "fp32", ours=True)
ROUNDED = Column("the peer's in float32, channels-last", "fp32", tuned=True)
HALF = Column("the peer's in bfloat16, not compiled", "bf16")
"""These two show what rounding alone does to the peer's own step: other kernels of the same precision, and 8 bits."""


def columns_of(shipped: Precision, compiles: bool, device: torch.device) -> list[Column]:
    """The columns of a table.

    Args:
        shipped: the peer's own precision on a GPU. A CPU takes float32 in all columns: it has no float16, and many only
            emulate bfloat16.
        compiles: whether the peer compiles whole networks as shipped, so that no column adds that.
        device: where it runs.
    """
    half: Precision = "bf16" if device.type == "cuda" else "fp32"
    if device.type == "cpu":
        shipped = "fp32"
    columns = [Column(AS_SHIPPED, shipped, compile="shipped"), Column(TUNED, half, tuned=True, compile="shipped")]
    if not compiles:
        columns.append(Column(COMPILED, half, tuned=True, compile="whole"))
    return [*columns, Column(OURS, half, ours=True), Column(OURS_COMPILED, half, ours=True, compile="whole")]


@dataclass(frozen=True)
class PeerCase:
    """A step of a peer's, and the same one of ours."""

    kind: str
    """Which of the peer's steps."""
    name: str
    sizes: dict[str, Any]
    """What the peer's networks are built with."""
    ours: StepCase
    equal: bool = True
    """Whether both do the same mathematics; where not, the losses are the same, and gradients differ by design."""
    remark: str = ""
    """What a reader of the row must know."""

    @property
    def label(self) -> str:
        """The name that `--cases` takes."""
        return f"{self.name}, batch {self.ours.batch_size}"
