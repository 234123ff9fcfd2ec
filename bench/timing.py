"""Timing several ways of doing one thing, interleaved, so that other load on the machine falls on all alike."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch

Call = Callable[[int], object]
"""Does the work once, on the input set of this number."""

WARMUP_CALLS = 3
MIN_ROUNDS, MAX_ROUNDS = 5, 500


@dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds: the median and the quartiles of the samples."""

    median_us: float
    q1_us: float
    q3_us: float
    num_samples: int

    @classmethod
    def of(cls, samples_us: list[float]) -> "Timing":
        q1, median, q3 = statistics.quantiles(samples_us, n=4, method="inclusive")
        return cls(median, q1, q3, len(samples_us))


def time_calls(device: torch.device, call: Call, numbers: range, num_sets: int) -> float:
    """Seconds per call of a run of calls: on CUDA by events, launches included."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for number in numbers:
            call(number % num_sets)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(numbers)
    start_s = time.perf_counter()
    for number in numbers:
        call(number % num_sets)
    return (time.perf_counter() - start_s) / len(numbers)


def time_interleaved(
    device: torch.device, calls: dict[str, Call], num_sets: int, seconds: float, sample_s: float
) -> dict[str, Timing]:
    """Time every call in rounds, one sample each per round, for about `seconds` in all.

    A sample is as many calls as take `sample_s`. Calls walk through the input sets in turn, whoever makes them, so that
    none finds in the cache what the one before it has just read. The order rotates from round to round, and its
    direction turns after every full rotation, so that nobody always follows the same one.

    Args:
        calls: the name of each way of doing the work, and that work on one input set; already warm.
        num_sets: the number of input sets.
    """
    names = list(calls)
    estimates = {name: time_calls(device, call, range(WARMUP_CALLS), num_sets) for name, call in calls.items()}
    per_sample = {name: max(1, math.ceil(sample_s / max(estimates[name], 1e-7))) for name in names}
    round_s = sum(estimates[name] * per_sample[name] for name in names)
    num_rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / max(round_s, 1e-7))))
    samples_us: dict[str, list[float]] = {name: [] for name in names}
    cursor = 0
    for _, order in zip(range(num_rounds), rotations(names), strict=False):
        for name in order:
            numbers = range(cursor, cursor := cursor + per_sample[name])
            samples_us[name].append(1e6 * time_calls(device, calls[name], numbers, num_sets))
    # The first round brings clocks and allocators to where they stay.
    return {name: Timing.of(samples[1:]) for name, samples in samples_us.items()}


def rotations(names: list[str]):
    """Endless orders of `names`: every rotation, then every rotation of the reversed list, and again."""
    for turn in count():
        direction = names if turn % 2 == 0 else names[::-1]
        for first in range(len(names)):
            yield direction[first:] + direction[:first]


def time_cuda_graph(call: Call, num_sets: int, repeats: int) -> Timing:
    """Time of one call within a replayed CUDA graph of one call per input set: the device's work without the host's."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for number in range(num_sets):
            call(number)
    graph.replay()
    samples_us = []
    for _ in range(repeats):
        seconds = time_calls(torch.device("cuda"), lambda _: graph.replay(), range(1), 1)
        samples_us.append(1e6 * seconds / num_sets)
    return Timing.of(samples_us)
