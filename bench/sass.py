"""Say what nvcc makes of CUDA kernels for an H200: registers, occupancy, instructions by the unit that executes them.

    python -m bench sass csrc/adaln/adaln_forward_cuda.cu --kernel "forward_kernel<BFloat16, BFloat16, 6>"

Instructions are those of the code, not of a run: a vector's path for memory that is not aligned is counted as well.
`python -m bench kernels --predict` counts what is executed.
"""

import re
from collections import Counter
from pathlib import Path

from bench.command_line import Parser
from bench.prediction import h200
from bench.prediction.cubin import Kernel, kernels_of
from bench.prediction.occupancy import resident_blocks
from bench.prediction.sass import loops, pipe_of


def main(arguments: list[str]) -> int:
    """The verb."""
    parser = Parser("sass", __doc__)
    parser.add_argument("source", type=Path, nargs="+", help="CUDA sources that CMakeLists.txt lists")
    parser.add_argument("--kernel", default="", help="a regular expression of the kernels' names")
    options = parser.parse_args(arguments)
    for source in options.source:
        for kernel in kernels_of(source):
            if re.search(options.kernel, kernel.name):
                print("\n".join(described(kernel)))
    return 0


def described(kernel: Kernel) -> list[str]:
    """A kernel for the terminal: a line of what a block needs, one for all of its code and one for each loop."""
    threads = kernel.max_threads or 1024
    blocks = resident_blocks(threads, kernel.registers, kernel.shared_bytes)
    share = blocks * threads / h200.WARP / h200.MAX_WARPS
    memory = f"{kernel.shared_bytes} B shared, {kernel.stack_bytes} B stack, {kernel.spill_bytes} B spills"
    occupancy = f"{blocks} blocks of {threads} threads, occupancy {share:.0%}"
    lines = [f"{kernel.name}: {kernel.registers} registers, {memory}; {occupancy}"]
    for title, begin, end in [("code", 0, len(kernel.code)), *(("loop", *loop) for loop in loops(kernel.code))]:
        part = kernel.code[begin:end]
        counts = Counter(pipe_of(one) for one in part)
        wide = sum(one.base in ("LDG", "STG") and ".128" in one.opcode for one in part)
        by_pipe = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        lines.append(f"  {title} {begin * 16:#06x}: {len(part)} instructions, {wide} global of 16 bytes ({by_pipe})")
    return lines
