"""Kinds of GPUs: what their makers say of them, for plans. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass

from sendvae_fast.engine.peak_flops import PEAK_BF16_FLOPS
from sendvae_fast.errors import UserError


@dataclass(frozen=True)
class GPU:
    """A kind of GPU: NVIDIA's data sheets, each number the one direction or the dense one."""

    name: str
    """As in `engine.peak_flops.PEAK_BF16_FLOPS`, with the memory where there are two."""
    memory_bytes: float
    """The data sheet's gigabytes as 10^9, which is a little less than a driver reports."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the other GPUs of a node, one direction: NVLink where it joins all of them, else PCIe x16."""
    network_bits_per_s: float
    """To other nodes, for each GPU: the adapters of NVIDIA's own systems of 8 (DGX A100, H100, H200, B200); for the
    cards that go into anybody's server an assumption, 100 Gbit/s."""

    @property
    def flops_per_s(self) -> float:
        """The most dense bf16 operations per second."""
        return PEAK_BF16_FLOPS[self.name.partition(" 40GB")[0]]


_ALL = (
    GPU("B200", 180e9, 7.7e12, 900e9, 400e9),
    GPU("H200", 141e9, 4.8e12, 450e9, 400e9),
    GPU("H100 PCIe", 80e9, 2.0e12, 64e9, 100e9),
    GPU("H100 NVL", 94e9, 3.9e12, 64e9, 100e9),
    GPU("H100", 80e9, 3.35e12, 450e9, 400e9),
    GPU("A100", 80e9, 2.039e12, 300e9, 200e9),
    GPU("A100 40GB", 40e9, 1.555e12, 300e9, 200e9),
    GPU("L40S", 48e9, 0.864e12, 32e9, 100e9),
    GPU("A10", 24e9, 0.6e12, 32e9, 100e9),
)
GPUS = {gpu.name: gpu for gpu in _ALL}
"""By name. Sources: the data sheets of B200 (HGX), H200, H100, A100, L40S and A10."""


def find_gpu(name: str) -> GPU:
    """The kind called `name`, in any case. UserError for another."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise UserError(f"--gpu={name} is no kind of GPU that is known here: give one of {', '.join(GPUS)}")


def gpu_in(device_name: str) -> GPU | None:
    """The kind of the device that CUDA names so; None for one that is not known."""
    return next((gpu for name, gpu in GPUS.items() if name in device_name), None)
