"""`sendvae doctor` in staged environments: what is broken is named, and the exit code says how bad it is."""

import errno
import fcntl
import importlib.metadata
import json
import types

import pytest
import torch
from two_ranks import run_on_two_ranks

from sendvae_fast.cli import doctor, doctor_gpu, doctor_network, doctor_system
from sendvae_fast.cli.findings import MARKS, Findings
from sendvae_fast.cli.main import main

GPU = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0)


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A machine on which all is well: one H200 under a new driver, roomy limits, a file system that locks."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor_gpu, "ask_driver", lambda: [["580.95", "Enabled", "1980 MHz", "1980 MHz", GPU.name]])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda = {
        "is_available": True, "device_count": 1, "get_arch_list": ["sm_80", "sm_90", "compute_90"],
        "get_device_properties": GPU, "mem_get_info": (140 * 2**30, 141 * 2**30),
    }  # fmt: skip
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(doctor_gpu, "nccl_version", lambda: (2, 27, 5))
    monkeypatch.setattr(doctor_system, "MIN_FREE_GIB", 0)
    monkeypatch.setattr(doctor_system, "MIN_SHARED_GIB", 0)
    monkeypatch.setattr(doctor_system, "MIN_OPEN_FILES", 1)
    monkeypatch.setattr(doctor_system, "file_system", lambda path: "lustre")
    monkeypatch.setattr(doctor, "environment", lambda: {
        "platform": "Linux", "python": "3.12", "cpu_capability": "AVX512", "num_threads": 1,
        "packages": dict.fromkeys(("torch", "numpy", "pillow", "safetensors"), "1.0"),
    })  # fmt: skip
    for look in ("look_at_ops", "look_at_attention"):  # what they say of this very machine is tested elsewhere
        monkeypatch.setattr(doctor, look, lambda findings: None)
    return tmp_path


def diagnose(capsys, folder):
    """The exit code, and the lines that are not fine."""
    code = main(["doctor", "--json", f"--out={folder}"])
    lines = json.loads(capsys.readouterr().out)
    return code, {line["name"]: line["value"] for line in lines if line["verdict"] in ("warning", "broken")}


def test_a_healthy_machine(healthy, capsys):
    assert diagnose(capsys, healthy) == (0, {})


def old_driver(monkeypatch):
    monkeypatch.setattr(doctor_gpu, "ask_driver", lambda: [["535.183", "Enabled", "1", "1", GPU.name]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def torch_for_cpus(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def no_code_for_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_80"])


def other_torchvision(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "torch==2.9.1"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.24.1")


def slow_start(monkeypatch):
    monkeypatch.setattr(doctor_gpu, "ask_driver", lambda: [["580.95", "Disabled", "345 MHz", "1980 MHz", GPU.name]])


def container(monkeypatch):
    monkeypatch.setattr(doctor_system, "file_system", lambda path: "overlay")
    monkeypatch.setattr(doctor_system, "MIN_SHARED_GIB", 1e6)


def no_locks(monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", fail)


def few_cores(monkeypatch):
    monkeypatch.setattr(doctor_system, "cgroup_cores", lambda: 0.5)


def absent_interface(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")


@pytest.mark.parametrize(
    ("stage", "code", "said"),
    [
        (old_driver, 2, {"driver": "CUDA 13 needs driver 580 or newer"}),
        (torch_for_cpus, 2, {"driver": "built for CPUs: a GPU is here that it cannot use"}),
        (no_code_for_the_gpu, 2, {"GPU 0": "has no code for it (sm_70, sm_80)"}),
        (other_torchvision, 2, {"torchvision and torch": "is for torch 2.9.1, not"}),
        (absent_interface, 2, {"NCCL takes": "nothing: NCCL_SOCKET_IFNAME=ib7"}),
        (slow_start, 1, {"nvidia-smi 0": "nvidia-smi -pm 1"}),
        (container, 1, {"file system": "of a container, gone with it", "/dev/shm": "--ipc=host"}),
        (no_locks, 1, {"locks": "mount it with flock"}),
        (few_cores, 1, {"cores": "0.5 by control group, but 1 torch threads"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_staged_environments(stage, code, said, healthy, capsys, monkeypatch):
    stage(monkeypatch)
    exit_code, found = diagnose(capsys, healthy)
    assert exit_code == code
    for name, words in said.items():
        assert words in found[name]
    assert found.keys() - said.keys() <= {"torchaudio and torch"}


def test_ok_is_beside_what_is_fine_alone(capsys):
    findings = Findings()
    for verdict in MARKS:
        findings.add("a", verdict, "x", verdict)
    assert findings.exit_code == 2
    findings.print_table()
    assert [line.split()[-2] for line in capsys.readouterr().out.splitlines()] == ["ok", "-", "warning", "broken"]


def test_which_gpus_a_binary_runs_on():
    """Binaries run on GPUs of their major version and no older minor one; PTX on every later GPU (CUDA's guide)."""
    assert doctor_gpu.runs_on(8, 6, ["sm_80"]) and doctor_gpu.runs_on(9, 0, ["sm_90a"])
    assert not doctor_gpu.runs_on(8, 0, ["sm_86"]) and not doctor_gpu.runs_on(10, 0, ["sm_90"])
    assert doctor_gpu.runs_on(10, 0, ["sm_90", "compute_90"]) and doctor_gpu.runs_on(12, 0, ["sm_120"])


def test_cores_of_control_groups(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    proc.write_text("0::/a/b\n")
    assert doctor_system.cgroup_cores(proc, root) is None
    (root / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (root / "a" / "cpu.max").write_text("150000 100000\n")
    assert doctor_system.cgroup_cores(proc, root) == 1.5
    (root / "cpu" / "x").mkdir(parents=True)
    (root / "cpu" / "x" / "cpu.cfs_quota_us").write_text("400000\n")
    (root / "cpu" / "x" / "cpu.cfs_period_us").write_text("100000\n")
    proc.write_text("4:cpu,cpuacct:/x\n3:memory:/x\n")
    assert doctor_system.cgroup_cores(proc, root) == 4.0


def test_the_file_system_of_a_path(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/a / ext4 rw 0 0\nserver:/x /scratch nfs4 rw 0 0\nb /scratch/fast\\040disk lustre rw 0 0\n")
    kinds = {"/home/me": "ext4", "/scratch/runs": "nfs4", "/scratch/fast disk/a": "lustre", "/scratched": "ext4"}
    assert {path: doctor_system.file_system(type(tmp_path)(path), mounts) for path in kinds} == kinds


def test_what_nccl_takes():
    """As NCCL's documentation of NCCL_SOCKET_IFNAME has it."""
    names = ["docker0", "eth0", "eth1", "ib0", "lo"]
    assert doctor_system.nccl_interface(names) == "ib0"
    assert doctor_system.nccl_interface(["docker0", "eth0", "lo"]) == "eth0"
    assert doctor_system.nccl_interface(["docker0", "lo"]) == "docker0" and doctor_system.nccl_interface([]) is None
    assert doctor_system.matching("eth", names) == ["eth0", "eth1"]
    assert doctor_system.matching("=eth1", names) == ["eth1"]
    assert doctor_system.matching("^docker,lo", names) == ["eth0", "eth1", "ib0"]


def test_speeds_of_an_all_reduce():
    """A ring of n ranks moves 2 (n - 1) / n of the bytes over each link (nccl-tests, PERFORMANCE.md)."""
    assert doctor_network.speeds(10**9, 0.5, 2) == (2.0, 2.0)
    assert doctor_network.speeds(10**9, 0.5, 8) == (2.0, 3.5)


def test_network_needs_ranks(capsys):
    assert main(["doctor", "--network"]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err


@pytest.mark.slow
def test_network_on_two_ranks(tmp_path):
    script = tmp_path / "network.py"
    script.write_text(
        "from sendvae_fast.cli import doctor_network\n"
        "doctor_network.SIZES, doctor_network.BUDGET_S = (1024, 2**20), 0.1\n"
        "doctor_network.measure_network()\n"
    )
    done = run_on_two_ranks(script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "all-reduce of fp32 over 2 ranks by gloo" and len(lines) == 5
    for line, size in zip(lines[2:4], (1024, 2**20), strict=True):
        count, ms, own, bus = line.replace(",", "").split()
        assert int(count) == size and float(ms) > 0 and float(own) == float(bus)  # of two ranks
