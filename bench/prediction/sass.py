"""Machine code (SASS) as nvdisasm prints it: instructions with their scheduling, and the loops they form."""

import re
from dataclasses import dataclass

LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z0-9_.]+)\s*"
    r"(?P<operands>.*?)\s*;.*?/\* 0x[0-9a-f]{16} \*/"
)
REST = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"^(\.L_x_\d+|\$\S+):")
SECTION = re.compile(r"^\t\.section\t\.text\.([^,\s]+),")
TARGET = re.compile(r"`\(([^)]+)\)")
NO_BARRIER = 7


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of 16 bytes.

    The last four say how it is scheduled (Jia et al. 2018, arXiv 1804.06826, section 2.1): the cycles until the warp's
    next may be issued, the barrier that is released when it has written or has read its operands (7: none), and the
    barriers it waits for, as bits.
    """

    address: int
    predicate: str  # "", "P0" or "!P0"
    opcode: str
    operands: tuple[str, ...]
    target: int | None
    stall: int
    write_barrier: int
    read_barrier: int
    waits: int

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]


def parse(text: str) -> dict[str, tuple[Instruction, ...]]:
    """The instructions of each kernel, by its mangled name."""
    kernels: dict[str, tuple[Instruction, ...]] = {}
    name, lines, labels = "", [], {}

    def finish() -> None:
        if lines:
            kernels[name] = tuple(_instruction(found, high, labels) for found, high in lines)

    pending = None
    for line in text.splitlines():
        if found := SECTION.match(line):
            finish()
            name, lines, labels = found[1], [], {}
        elif line.startswith("\t.section"):
            finish()
            name, lines, labels = "", [], {}
        elif not name:
            continue
        elif found := LINE.match(line):
            pending = found
        elif pending is not None and (found := REST.match(line)):
            lines.append((pending, found[1]))
            pending = None
        elif found := LABEL.match(line):
            labels[found[1]] = 16 * len(lines)
    finish()
    return kernels


def _instruction(found: re.Match, high: str, labels: dict[str, int]) -> Instruction:
    control = int(high, 16) >> 41
    target = TARGET.search(found["operands"])
    return Instruction(
        address=int(found["address"], 16),
        predicate=found["predicate"] or "",
        opcode=found["opcode"],
        operands=tuple(operand.strip() for operand in found["operands"].split(",")) if found["operands"] else (),
        target=labels.get(target[1]) if target else None,
        stall=control & 15,
        write_barrier=control >> 5 & 7,
        read_barrier=control >> 8 & 7,
        waits=control >> 11 & 63,
    )


# The unit that executes an instruction, by the beginning of its name.
PIPES = {
    "global": ("LDG", "STG", "ATOMG", "RED", "LD", "ST", "LDL", "STL", "LDGSTS", "ATOM", "UBLKCP"),
    "shared": ("LDS", "STS", "ATOMS", "LDSM", "STSM"),
    "shuffle": ("SHFL",),
    "barrier": ("BAR", "SYNCS", "UCGABAR"),
    "special": ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "fp32": ("FFMA", "FADD", "FMUL", "FFMA32I", "HADD2", "HFMA2", "HMUL2"),
    "imad": ("IMAD",),
    "control": ("BRA", "BRX", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "WARPSYNC", "NOP", "BREAK", "YIELD", "JMP"),
}
PIPE = {name: pipe for pipe, names in PIPES.items() for name in names}


def pipe_of(instruction: Instruction) -> str:
    """The class that the counts name: those above, uniform (one for the warp), else integer, compare and move."""
    base = instruction.base
    if base in PIPE:
        return PIPE[base]
    is_uniform = base.startswith("U") or base in ("R2UR", "S2UR", "LDC")
    return "uniform" if is_uniform else "alu"


def loops(code: tuple[Instruction, ...]) -> list[tuple[int, int]]:
    """Begin and end (past the last) of each loop, as indices: a branch back and what lies between, innermost first.

    The branch to itself that fills a kernel's end is none, nor are those of the subroutines after the last EXIT.
    """
    last = max((i for i, one in enumerate(code) if one.base == "EXIT"), default=len(code))
    found = {}
    for index, one in enumerate(code[: last + 1]):
        if one.base == "BRA" and one.target is not None and one.target < one.address:
            begin = one.target // 16
            found[begin] = max(found.get(begin, 0), index + 1)
    return sorted(found.items(), key=lambda item: item[1] - item[0])
