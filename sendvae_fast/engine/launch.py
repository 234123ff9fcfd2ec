"""The place of a process in its job, as torchrun, DeepSpeed's launcher or Slurm's `srun` say it in variables.

Whoever starts several processes by hand sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun
does. `srun` sets variables of its own; `adopt_slurm` translates them, so that all else knows only one set of names.
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from sendvae_fast.errors import UserError

FIRST_PORT, NUM_PORTS = 12_000, 16_000
"""Where rank 0 of a Slurm step listens: below the ports that systems give to outgoing connections."""
LAUNCHERS = {"TORCHELASTIC_RUN_ID": "torchrun", "LOCAL_WORLD_SIZE": "torchrun", "LOCAL_SIZE": "deepspeed"}
"""Variables that show who set RANK and WORLD_SIZE, in place of somebody's batch script."""


@dataclass(frozen=True)
class Place:
    """A process among the processes of its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = "none"
    """Who started it: "torchrun", "deepspeed", "srun", "hand" or "none" for a process that is alone."""

    @property
    def is_alone(self) -> bool:
        """Whether nobody said that there are others, so that no address is needed."""
        return self.launcher == "none"


def read_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that RANK and its like give, after `adopt_slurm`.

    Raises:
        UserError: a variable is missing beside the others, no number, or contradicts another.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Place()
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        there = ", ".join(f"{name}={environment[name]}" for name in ("RANK", "WORLD_SIZE") if name in environment)
        raise UserError(
            f"the environment says {there}, but not how the ranks meet ({', '.join(missing)} not set): start them with "
            "torchrun, deepspeed or srun, or unset RANK and WORLD_SIZE for a single process"
        )
    remedy = "start the ranks with torchrun, deepspeed or srun, which set it"
    rank, size = _number(environment, "RANK", remedy), _number(environment, "WORLD_SIZE", remedy)
    local_rank = _number(environment, "LOCAL_RANK", remedy) if "LOCAL_RANK" in environment else 0
    if not 1 <= _number(environment, "MASTER_PORT", remedy) <= 65_535:
        raise UserError(f"MASTER_PORT={environment['MASTER_PORT']} is no port: give one of 1 to 65535")
    if rank >= size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}: {remedy}")
    if local_rank > rank:
        raise UserError(f"LOCAL_RANK={local_rank} is above RANK={rank}, which counts all nodes: {remedy}")
    launcher = next((name for variable, name in LAUNCHERS.items() if variable in environment), "hand")
    if launcher == "hand" and "SLURM_STEP_NUM_TASKS" in environment:
        launcher = "srun"
    return Place(rank, size, local_rank, launcher)


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """In a task of `srun`, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from Slurm's variables.

    Nothing is done where torchrun or DeepSpeed's launcher has set them, in a batch script itself (which is no task of a
    step), or in a step of one task. MASTER_ADDR and MASTER_PORT that are set go before the step's first node and a port
    made of job and step. Doing it again changes nothing.

    Raises:
        UserError: Slurm's variables are incomplete, no numbers, or contradict each other or RANK and WORLD_SIZE.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment or any(name in environment for name in LAUNCHERS):
        return
    remedy = "start the tasks with srun, and set none of its SLURM_ variables yourself"
    size = _number(environment, "SLURM_STEP_NUM_TASKS", remedy)
    if size == 1 and environment.keys().isdisjoint({"RANK", "WORLD_SIZE"}):
        return
    rank, local_rank = _number(environment, "SLURM_PROCID", remedy), _number(environment, "SLURM_LOCALID", remedy)
    if rank >= size:
        raise UserError(f"SLURM_PROCID={rank} is not below SLURM_STEP_NUM_TASKS={size}: {remedy}")
    if local_rank > rank:
        raise UserError(f"SLURM_LOCALID={local_rank} is above SLURM_PROCID={rank}: {remedy}")
    given = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE")}
    if any(given.values()) and given != {"RANK": str(rank), "WORLD_SIZE": str(size)}:
        words = " and ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise UserError(
            f"the environment says {words}, but Slurm that this is task {rank} of {size}: unset RANK and WORLD_SIZE in "
            "the batch script"
        )
    step = _number(environment, "SLURM_JOB_ID", remedy), _number(environment, "SLURM_STEP_ID", remedy)
    if "SLURM_STEP_NODELIST" not in environment and "MASTER_ADDR" not in environment:
        raise UserError(f"SLURM_STEP_NODELIST is not set beside SLURM_PROCID={rank}: {remedy}")
    environment.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    environment.setdefault("MASTER_PORT", str(port_of_step(*step)))
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_host(environment["SLURM_STEP_NODELIST"])


def port_of_step(job: int, step: int) -> int:
    """The port of a Slurm step's rank 0: the same for all its tasks, and another for the next step or job."""
    return FIRST_PORT + (31 * job + step) % NUM_PORTS


def first_host(node_list: str) -> str:
    """The first node of Slurm's compressed list: "gpu007" of "gpu[007-009,012],login1".

    Raises:
        UserError: the list is empty.
    """
    first = re.split(r",(?![^\[]*\])", node_list.strip(), maxsplit=1)[0]
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
    if not re.fullmatch(r"[\w.-]+", host):
        raise UserError(
            f"SLURM_STEP_NODELIST={node_list!r} names no node: start the tasks with srun, or set MASTER_ADDR"
        )
    return host


def _number(environment: Mapping[str, str], name: str, remedy: str) -> int:
    text = environment.get(name)
    if text is None:
        raise UserError(f"{name} is not set beside the other variables of a job of several processes: {remedy}")
    if not text.isascii() or not text.isdecimal():
        raise UserError(f"{name}={text!r} is no number: {remedy}")
    return int(text)
