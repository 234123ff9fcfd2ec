"""The settings that stages share, the length of training and its pictures, and those of a latent cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sendvae_fast import checks
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.engine.checkpoint_files import is_milestone


@dataclass(kw_only=True)
class LoopConfig:
    """How long to train and how often to report. Raises `UserError` for a value out of range."""

    num_steps: int = 100_080
    """Optimizer steps. The paper: 80 epochs x 1251 steps for stage 1, 400,320 or 4,003,200 for stage 2."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl; values are means over those steps, and over all ranks."""
    save_every: int = 5_000
    """Steps between checkpoints; the last step is always saved."""
    save_in_background: bool = True
    """Write checkpoints beside the steps that follow: a step waits for a copy of the state in host memory, which is
    the checkpoint's size over all ranks and taken for good. false: a step waits for the disk."""
    preview_every: int = 5_000
    """Steps between preview pictures in samples/; the last step always has one."""
    profile_steps: int = 0
    """Steps under PyTorch's profiler, from the tenth after each start on: a trace and a summary in profile/."""
    evaluate_every: int | None = None
    """Steps between evaluations (`evaluation`); the last step always has one. null: 5,000 in stage 1 and 25,000 in
    stage 2 where `evaluation.features` has its weights, else none."""
    keep_checkpoints: int = 2
    """Checkpoints kept; the oldest goes once a newer one is verified."""
    keep_every: int | None = field(default=None, metadata={checks.ADDED_LATER: True})
    """Steps between milestones: checkpoints of these steps are written beside those of `save_every`, and kept for good.
    null: none. 400,320 keeps the 80th and every 80th epoch of the paper's generators."""
    step_timeout_s: float = 600.0
    """Seconds without a finished step, after the first one, that end the run: the stacks and last collectives of all
    ranks are written, and the message names the rank that does not answer. A step may always take 20 times as long as
    the longest before."""
    start_timeout_s: float = 3600.0
    """The same for the first step of each start, in which networks are compiled, and for checkpoints, previews and
    evaluations. A collective fails after as long."""
    spike_threshold: float = 20.0
    """Robust z-score of a step's loss, against the median of the last 128, above which a warning is given; 0: none."""
    spike_return_steps: int = 0
    """Steps up to such a spike whose batches are passed over, after the run has gone back to its newest checkpoint
    before them; 0 only warns. Each start judges losses afresh, so an interrupted run may go back from other spikes."""

    def __post_init__(self) -> None:
        checks.above(0, self, "step_timeout_s", "start_timeout_s", where="loop")
        checks.at_least(0, self, "profile_steps", where="loop", hint=" (0 profiles nothing)")
        checks.at_least(0, self, "spike_threshold", "spike_return_steps", where="loop")
        checks.at_least(
            1, self, "num_steps", "log_every", "save_every", "preview_every", "keep_checkpoints", where="loop"
        )
        checks.at_least(1, self, "evaluate_every", "keep_every", where="loop", hint=", or null")

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, be it the last or not."""
        return step % self.save_every == 0 or is_milestone(step, self.keep_every)


@dataclass(kw_only=True)
class ImageDataConfig(LoaderConfig):
    """The training images and how many of them make a step. Raises `UserError` for a value out of range."""

    section: ClassVar[str] = "data"

    root: str | None = None
    """The photographs: an ImageFolder (`root/<class>/<image>`), tar shards, parquet files or a catalog of them. Stage 2
    without REPA needs none."""
    image_size: int = 256
    """Side of the ADM centre crop in pixels."""
    global_batch: int = 1024
    """Images per optimizer step over all ranks and accumulation steps. The paper: 1024 in stage 1, 256 in stage 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(1, self, "image_size", "global_batch", where=self.section)


@dataclass(kw_only=True)
class CacheConfig:
    """The images, the autoencoder and the folder of a cache. Raises `UserError` for a value out of range."""

    out: str
    """Folder of the latent shards; an interrupted job goes on in it."""
    autoencoder: str
    """Autoencoder folder or stage 1 run."""
    data: str
    """The pictures to encode: an ImageFolder, tar shards, parquet files or a catalog."""
    image_size: int = 256
    """Side of the ADM centre crop in pixels."""
    batch_size: int = 64
    """Images encoded at once on a rank."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of mean and standard deviation."""
    shard_size: int = 4096
    """Samples per shard."""
    flips: bool = False
    """Also encode the mirrored images; training then flips half of the samples."""
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(cache_mb=0))
    """How images are read."""

    def __post_init__(self) -> None:
        checks.weight_paths(self, "out")
        checks.choices(self)
        checks.at_least(1, self, "image_size", "batch_size", "shard_size")
