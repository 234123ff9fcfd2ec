"""What the jobs on two hosts have in common: a tiny training run, and what became of it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from two_hosts import missing

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
NUM_STEPS = 60
STEP_TIMEOUT_S = 10.0
WAIT_S = 600.0
SETTINGS = {"OMP_NUM_THREADS": "1", "SENDVAE_PYTHON": PYTHON, "PYTHONPATH": str(ROOT)}
NOTHING = (
    "set SENDVAE_CLUSTER=1 for jobs on two hosts, which take minutes" if "SENDVAE_CLUSTER" not in os.environ else None
)
marks = [pytest.mark.slow, pytest.mark.skipif((problem := NOTHING or missing()) is not None, reason=problem or "")]
"""Of every test: whether it runs here."""


def train(photos, run, *more):
    return ["train", "vae", "--config", photos / "tiny.yaml", f"--run={run}", *more]


def steps_of(run):
    """The steps in a run's metrics."""
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def text_of(path):
    return path.read_text() if path.exists() else ""


def wait_for(is_so, what):
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def last_checkpoint(run):
    """Every file of the last step's checkpoint, but the one with the moment and the folder in it."""
    folder = run / "checkpoints" / f"step_{NUM_STEPS:08d}"
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
