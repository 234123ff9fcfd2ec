"""scripts/slurm/chain.sh: what it submits, with a stand-in for sbatch. Real jobs of it are in tests/cluster."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from sendvae_fast.cli.main import main

ROOT = Path(__file__).parents[2]
SBATCH = """#!/bin/sh
printf '%s\\n' "$@" '' >> "$SUBMITTED"
grep -c '^$' "$SUBMITTED"
"""


@pytest.fixture(params=["pretrained", "demo"])
def submitted(request, tmp_path):
    """Of each job its options for sbatch, and the words behind run.sbatch."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SUBMITTED": str(tmp_path / "jobs")}
    words = ("photos", request.param, str(tmp_path / "a run"), "--gpus-per-node=8", "--time=1:00:00")
    subprocess.run([ROOT / "scripts/slurm/chain.sh", *words], check=True, env=environment | {"NODES": "2"})
    jobs = []
    for job in (tmp_path / "jobs").read_text().split("\n\n")[:-1]:
        options, command = job.split(f"\n{ROOT}/scripts/slurm/run.sbatch\n")
        jobs.append((options.splitlines(), command.splitlines()))
    return jobs


def test_each_job_waits_for_the_one_before(submitted, tmp_path):
    names = ["stage1", "latents", "stage2", "samples", "evaluate"]
    for number, (name, (options, _)) in enumerate(zip(names, submitted, strict=True)):
        assert options == [
            "--parsable",
            f"--job-name={name}",
            f"--nodes={2 if name.startswith('stage') else 1}",
            f"--output={tmp_path}/a run/{name}-%j.log",
            "--gpus-per-node=8",
            "--time=1:00:00",
            *([f"--dependency=afterok:{number}"] if number else []),
        ]


def test_every_verb_takes_its_command_and_what_the_ones_before_have_made(submitted, capsys, tmp_path):
    configs = []
    for _, command in submitted:
        assert main(["config", "show", *command]) == 0, capsys.readouterr().err
        configs.append(yaml.safe_load(capsys.readouterr().out))
    vae, latents, sit, samples, evaluation = configs
    assert latents["autoencoder"] == samples["autoencoder"] == vae["run"] == f"{tmp_path}/a run/vae"
    assert sit["latents"] == latents["out"] and samples["generator"] == sit["run"]
    assert evaluation["samples"] == samples["out"]
    assert latents["data"] == vae["data"]["root"] == sit["data"]["root"] == "photos/train"
    assert latents["image_size"] == vae["data"]["image_size"] == sit["data"]["image_size"]
