"""A process learns its place from torchrun's, DeepSpeed's and Slurm's variables; wrong ones are one line."""

import pytest
import torch

from sendvae_fast.engine import distributed as distributed_module
from sendvae_fast.engine.agreement import difference, facts_of_rank
from sendvae_fast.engine.launch import Place, adopt_slurm, first_host, port_of_step, read_place
from sendvae_fast.errors import UserError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
# As Slurm 22.05 sets them for task 5 of `srun --nodes=2 --ntasks=8`, beside some fifty others.
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[007-008]", "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[007-009]",
}  # fmt: skip


def adopted(**changes):
    """The place of a task of srun, with some variables changed or, with None, missing."""
    environment = {name: value for name, value in {**SRUN, **changes}.items() if value is not None}
    adopt_slurm(environment)
    return read_place(environment), environment


def test_a_process_without_variables_is_alone():
    assert read_place({}) == Place(0, 1, 0, "none")


def test_torchrun_and_deepspeed():
    assert read_place(TORCHRUN) == Place(5, 8, 1, "torchrun")
    deepspeed = {
        name: value for name, value in TORCHRUN.items() if not name.startswith(("LOCAL_WORLD", "TORCHELASTIC"))
    }
    assert read_place({**deepspeed, "LOCAL_SIZE": "4"}) == Place(5, 8, 1, "deepspeed")
    assert read_place(deepspeed) == Place(5, 8, 1, "hand")


def test_a_task_of_srun():
    place, environment = adopted()
    assert place == Place(5, 8, 1, "srun")
    assert environment["MASTER_ADDR"] == "gpu007"
    assert int(environment["MASTER_PORT"]) == port_of_step(4711, 2)
    again = dict(environment)
    adopt_slurm(again)
    assert again == environment


def test_what_is_no_task_of_several_is_alone():
    for environment in (
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # the batch script
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ):
        before = dict(environment)
        adopt_slurm(environment)
        assert environment == before and read_place(environment).is_alone


def test_a_launcher_in_a_task_of_srun_goes_first():
    environment = {**SRUN, **TORCHRUN, "RANK": "3"}
    adopt_slurm(environment)
    assert read_place(environment) == Place(3, 8, 1, "torchrun")


def test_addresses_that_are_set_are_kept():
    _, environment = adopted(MASTER_ADDR="10.0.0.1", MASTER_PORT="1234", SLURM_STEP_NODELIST=None)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_ports_of_steps_differ_and_are_below_those_of_outgoing_connections():
    ports = [port_of_step(job, step) for job in range(1000, 1100) for step in range(20)]
    assert len(set(ports)) == len(ports) and all(12_000 <= port < 28_000 for port in ports)
    assert 12_000 <= port_of_step(2**26, 2**10) < 28_000


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("login1,gpu[007-009]", "login1"),
        ("rack[2,4]node[10-12]", "rack2node10"),
        ("a-b.c[5]-ib", "a-b.c5-ib"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodes, first):
    """As `scontrol show hostnames` expands it."""
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "[", "a b", "(null)"])
def test_a_list_without_a_host(nodes):
    with pytest.raises(UserError, match="names no node"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set"),
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID is not set"),
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is not set"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID='x' is no number"),
        ({"SLURM_PROCID": "-1"}, "SLURM_PROCID='-1' is no number"),
        ({"SLURM_STEP_NUM_TASKS": "²"}, "SLURM_STEP_NUM_TASKS='²' is no number"),
        ({"SLURM_PROCID": "8"}, "SLURM_PROCID=8 is not below SLURM_STEP_NUM_TASKS=8"),
        ({"SLURM_LOCALID": "6"}, "SLURM_LOCALID=6 is above SLURM_PROCID=5"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 and WORLD_SIZE=1, but Slurm that this is task 5 of 8: unset"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8, but Slurm"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is no number"),
    ],
)
def test_slurm_variables_that_contradict_are_one_line(changes, words):
    with pytest.raises(UserError, match=words):
        adopted(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_ADDR": None}, r"how the ranks meet \(MASTER_ADDR not set\)"),
        ({"WORLD_SIZE": None}, r"\(WORLD_SIZE not set\)"),
        ({"RANK": None}, r"\(RANK not set\)"),
        ({"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "7"}, "LOCAL_RANK=7 is above RANK=5"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
    ],
)
def test_torchrun_variables_that_contradict_are_one_line(changes, words):
    with pytest.raises(UserError, match=words):
        read_place({name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None})


def test_ranks_of_other_versions_are_named():
    ours = facts_of_rank(torch.device("cpu"))
    assert ours["torch"] == torch.__version__ and difference([ours] * 3) is None
    for name in ("sendvae_fast", "commit", "torch", "deepspeed"):
        problem = difference([ours, ours, {**ours, "host": "node-c", name: "0.0"}])
        assert f"has {name} {ours[name]} and rank 2 on node-c has {name} 0.0" in problem
    gpu = {**ours, "NCCL": "2.27.5", "GPU": "GPU-1"}
    assert "NCCL 2.27.5 and rank 1" in difference([gpu, {**gpu, "NCCL": "2.26.2", "GPU": "GPU-2"}])


def test_ranks_that_share_a_gpu_are_named():
    def on(host, gpu):
        return {"host": host, "torch": "2.11", "GPU": gpu}

    assert difference([on("a", "0"), on("a", "1"), on("b", "0"), on("b", "1")]) is None
    assert "ranks 1 and 3 on a have the same GPU" in difference(
        [on("a", "0"), on("a", "1"), on("b", "1"), on("a", "1")]
    )


def test_the_gpu_of_a_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    own_gpu = distributed_module._own_gpu
    assert own_gpu(Place(7, 8, 3, "torchrun")) == torch.device("cuda", 3)
    with pytest.raises(UserError, match="local rank 4 has no GPU of its own"):
        own_gpu(Place(4, 8, 4, "srun"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as with srun --gpus-per-task=1
    assert own_gpu(Place(7, 8, 3, "srun")) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="local rank 3 has no GPU"):
        own_gpu(Place(7, 8, 3, "torchrun"))
