"""The arithmetic that kinds of GPUs can do."""

from __future__ import annotations

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989.5e12,
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
}
"""Dense bf16 with fp32 sums, by a part of the GPU's name, the longer names first (NVIDIA's data sheets)."""
