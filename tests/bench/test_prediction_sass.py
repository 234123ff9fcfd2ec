"""Machine code followed on the CPU: instructions against plain arithmetic, ways through branches, addresses."""

import random

import numpy as np
import pytest

from bench.prediction import warp
from bench.prediction.accesses import shared_turns
from bench.prediction.registers import LANES, Registers, Value, immediate, predicate_row, row_of
from bench.prediction.sass import loops, parse, pipe_of
from bench.prediction.semantics import effect_of
from bench.prediction.warp import Code, Follower, Launch
from sendvae_fast.errors import UserError

WORD = 1 << 32
ALL = np.ones(LANES, bool)


def assembled(*lines: str):
    """Instructions as nvdisasm prints them; a line "L1:" is a label. Their scheduling is 0: no stall, barrier 0."""
    text, address = ['\t.section\t.text.kernel,"ax",@progbits'], 0
    for line in lines:
        if line.endswith(":"):
            text.append(f".L_x_{line[1:]}")
            continue
        text += [f"        /*{address:04x}*/ {line} ; /* 0x{0:016x} */", f"          /* 0x{7 << 46 | 7 << 49:016x} */"]
        address += 16
    return parse("\n".join(text))["kernel"]


def signed(x: int) -> int:
    return x - WORD if x >= WORD // 2 else x


def numbers(count: int) -> list[list[int]]:
    draw = random.Random(0)
    special = [0, 1, 2, WORD - 1, WORD // 2, WORD // 2 - 1, 31, 32]
    return [[draw.choice(special) if draw.random() < 0.5 else draw.randrange(WORD) for _ in range(LANES)]
            for _ in range(count)]  # fmt: skip


INTEGERS = [
    ("IADD3 R10, R0, -R1, R2", lambda a, b, c: a - b + c),
    ("VIADD R10, R0, 0xfffffff0", lambda a, b, c: a - 16),
    ("IMAD R10, R0, R1, R2", lambda a, b, c: a * b + c),
    ("IMAD.MOV.U32 R10, RZ, RZ, R2", lambda a, b, c: c),
    ("IMAD.SHL.U32 R10, R0, 0x8, RZ", lambda a, b, c: 8 * a),
    ("LEA R10, R0, R1, 0x3", lambda a, b, c: 8 * a + b),
    ("LEA.HI R10, R0, R1, R2, 0x5", lambda a, b, c: ((c * WORD + a << 5) % WORD**2 >> 32) + b),
    ("LEA.HI.SX32 R10, R0, R1, 0x1", lambda a, b, c: (2 * signed(a) >> 32) + b),
    ("SHF.L.U32 R10, R0, 0x7, RZ", lambda a, b, c: a << 7),
    ("SHF.R.U32.HI R10, RZ, 0x5, R0", lambda a, b, c: a >> 5),
    ("SHF.R.S32.HI R10, RZ, 0x1f, R0", lambda a, b, c: signed(a) >> 31),
    ("SHF.R.U64 R10, R0, 0x9, R1", lambda a, b, c: (b * WORD + a) >> 9),
    ("SHF.L.U64.HI R10, R0, 0x9, R1", lambda a, b, c: (b * WORD + a) << 9 >> 32),
    ("LOP3.LUT R10, R0, R1, R2, 0x96, !PT", lambda a, b, c: a ^ b ^ c),
    ("LOP3.LUT R10, R0, 0xf0, RZ, 0xc0, !PT", lambda a, b, c: a & 0xF0),
    ("PRMT R10, R0, 0x5410, R1", lambda a, b, c: b % 65536 << 16 | a % 65536),
    ("PRMT R10, R0, 0x9910, RZ", lambda a, b, c: (a & 0xFFFF) | (0xFFFF0000 if a & 0x8000 else 0)),
    ("VIMNMX R10, R0, R1, PT", lambda a, b, c: min(signed(a), signed(b))),
    ("VIMNMX.U32 R10, R0, R1, !PT", lambda a, b, c: max(a, b)),
    ("IABS R10, R0", lambda a, b, c: abs(signed(a))),
    ("IMAD.HI.U32 R10, R0, R1, RZ", lambda a, b, c: a * b >> 32),
]


def run(text: str, *values: list[int]) -> Registers:
    (one,) = assembled(text)
    state = Registers(bytes(16))
    for row, lanes in enumerate(values):
        state.write(row, Value(np.array(lanes, np.uint64), ALL), ALL)
    effect_of(one)(state, ALL)
    return state


@pytest.mark.parametrize(("text", "expected"), INTEGERS, ids=[text for text, _ in INTEGERS])
def test_integers(text, expected):
    operands = numbers(3)
    state = run(text, *operands)
    assert state.known[10].all()
    assert state.bits[10].tolist() == [expected(*lane) % WORD for lane in zip(*operands, strict=True)]


def test_sums_and_comparisons_of_64_bits():
    """Two words joined by carries, as ptxas writes them."""
    low, high, other_low, other_high = numbers(4)
    other_high = [high[i] if i % 2 else other_high[i] for i in range(LANES)]
    state = Registers(b"")
    for row, lanes in enumerate((low, high, other_low, other_high)):
        state.write(row, Value(np.array(lanes, np.uint64), ALL), ALL)
    for one in assembled(
        "IADD3 R4, P0, R0, -R2, RZ", "IADD3.X R5, R1, ~R3, RZ, P0, !PT", "IMAD.WIDE.U32 R6, P2, R0, R2, R0",
        "ISETP.GE.U32.AND P1, PT, R0, R2, PT", "ISETP.GE.AND.EX P1, PT, R1, R3, PT, P1",
        "IADD3 R10, P4, P5, -R0, R2, R1", "IMAD.HI.U32 R11, P6, R0, R2, R0",
        "LEA R8, P3, R0, R2, 0x3", "LEA.HI.X R9, R0, R3, R1, 0x3, P3",
    ):  # fmt: skip
        effect_of(one)(state, ALL)
    first, second = (
        [b * WORD + a for a, b in zip(x, y, strict=True)] for x, y in ((low, high), (other_low, other_high))
    )
    pairs = list(zip(first, second, strict=True))
    assert state.read_pair(4).bits.tolist() == [(a - b) % WORD**2 for a, b in pairs]
    assert state.read_pair(8).bits.tolist() == [(8 * a + b) % WORD**2 for a, b in pairs]
    products = [a * b + c for a, b, c in zip(low, other_low, first, strict=True)]
    assert state.read_pair(6).bits.tolist() == [product % WORD**2 for product in products]
    assert state.predicate_bits[2].tolist() == [product >= WORD**2 for product in products]

    assert state.bits[11].tolist() == [product % WORD**2 >> 32 for product in products]
    assert state.predicate_bits[6].tolist() == [product >= WORD**2 for product in products]
    carried = [(WORD - a + b + c) // WORD for a, b, c in zip(low, other_low, high, strict=True)]
    assert (state.predicate_bits[4].astype(int) + state.predicate_bits[5]).tolist() == carried
    assert {0, 1, 2} == set(carried)

    def long(x: int) -> int:
        return x - WORD**2 if x >= WORD**2 // 2 else x

    assert state.predicate_bits[1].tolist() == [long(a) >= long(b) for a, b in pairs]


def test_division_by_reciprocal():
    """Unsigned division as nvcc writes it: an estimate in fp32, mended with two products."""
    numerators, divisors = numbers(2)
    divisors = [max(1, divisor) for divisor in divisors]
    state = Registers(b"")
    for row, lanes in enumerate((numerators, divisors)):
        state.write(row, Value(np.array(lanes, np.uint64), ALL), ALL)
    with np.errstate(all="ignore"):
        for one in assembled(
            "I2F.U32.RP R2, R1", "MUFU.RCP R2, R2", "IADD3 R3, R2, 0xffffffe, RZ", "F2I.FTZ.U32.TRUNC.NTZ R5, R3",
            "IMAD.MOV R6, RZ, RZ, -R5", "IMAD R6, R6, R1, RZ", "IMAD.MOV.U32 R4, RZ, RZ, RZ",
            "IMAD.HI.U32 R5, R5, R6, R4", "IMAD.HI.U32 R7, R5, R0, RZ", "IMAD.MOV R8, RZ, RZ, -R7",
            "IMAD R8, R1, R8, R0",
        ):  # fmt: skip
            effect_of(one)(state, ALL)
    for n, d, quotient, rest in zip(numerators, divisors, state.bits[7].tolist(), state.bits[8].tolist(), strict=True):
        assert quotient * d + rest == n and 0 <= rest < 3 * d, "at most two off, which two comparisons mend"


def test_what_is_unknown_stays_unknown():
    state = run("LDG.E.64 R0, desc[UR6][R4.64]", [7] * LANES, [7] * LANES)
    assert not state.known[0].any() and not state.known[1].any()
    (add,) = assembled("IADD3 R2, R0, 0x1, RZ")
    effect_of(add)(state, ALL)
    assert not state.known[2].any()
    # A predicate among packed ones is known though others are not.
    state.write_predicate(0, ALL, ALL, ALL)
    for one in assembled("P2R R3, PR, RZ, 0x7", "LOP3.LUT P4, RZ, R3, 0x1, RZ, 0xc0, !PT",
                         "LOP3.LUT P5, RZ, R3, 0x2, RZ, 0xc0, !PT"):  # fmt: skip
        effect_of(one)(state, ALL)
    assert state.predicate_known[4].all() and state.predicate_bits[4].all() and not state.predicate_known[5].any()


def test_what_cannot_be_read_is_an_error():
    (one,) = assembled("LOP3.LUT R0, R1, R2, R3, [R4], !PT")
    with pytest.raises(UserError, match="cannot read: LOP3.LUT R0, R1, R2, R3"):
        effect_of(one)


def test_operands():
    assert (row_of("R12.64"), row_of("URZ"), row_of("UR4"), row_of("0x4")) == (12, 319, 260, None)
    assert (predicate_row("!P3"), predicate_row("UPT"), predicate_row("R3")) == (3, 15, None)
    assert immediate("-0x1") == 0xFFFFFFFF and immediate("1", floating=True) == 0x3F800000 and immediate("R1") is None


KERNEL = (  # for (i = 0; i < 3; ++i) if (lane < 8) a[i * 128 + lane] = a subroutine's number, by 4 bytes
    "S2R R0, SR_TID.X", "ULDC.64 UR4, c[0x0][0x210]", "IMAD.MOV.U32 R1, RZ, RZ, RZ", "L1:",
    "ISETP.GE.U32.AND P0, PT, R0, 0x8, PT", "BSSY B0, `(.L_x_2)", "@P0 BRA `(.L_x_3)",
    "LEA R2, R1, R0, 0x7", "IMAD.WIDE.U32 R2, R2, 0x4, UR4", "FSETP.GT.AND P2, PT, R9, 1, PT",
    "@!P2 BRA `(.L_x_4)", "CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath)", "L4:",
    "STG.E desc[UR6][R2.64], R9", "L3:", "BSYNC B0", "L2:",
    "IADD3 R1, R1, 0x1, RZ", "ISETP.NE.AND P1, PT, R1, 0x3, PT", "@P1 BRA `(.L_x_1)", "EXIT",
)  # fmt: skip


def test_a_warp_goes_its_way(monkeypatch):
    """Lanes part and meet again; the loop runs three times; the way of numbers out of range is not taken."""
    code = assembled(*KERNEL)
    assert loops(code) == [(3, 16)]
    address = 0x7F0000001000
    launch = Launch((2, 1, 1), (32, 1, 1), address.to_bytes(8, "little"))
    trace = Follower(Code(code), launch, 0, 0).follow((500.0,))
    assert sum(trace.issued.values()) == 3 + 3 * (3 + 5 + 1 + 3) + 1 and trace.undecided == 0
    assert trace.opcodes["CALL"] == 0 and trace.opcodes["BSYNC"] == 3
    stores = [access.addresses.tolist() for access in trace.accesses]
    assert stores == [[address + 4 * (128 * i + lane) for lane in range(8)] for i in range(3)]
    assert [len(access.sectors()) for access in trace.accesses] == [1, 1, 1]
    monkeypatch.setattr(warp, "MAX_STEPS", 100)
    endless = assembled("L1:", "BRA `(.L_x_1)", "EXIT")
    with pytest.raises(UserError, match="does not end"):
        Follower(Code(endless), launch, 0, 0).follow(())


def test_the_last_block_goes_on_where_blocks_count_themselves():
    """Whether a block is the last is unknown; without a counter no unknown exit is taken."""
    kernel = ("{}", "ISETP.NE.AND P0, PT, R3, 0x7, PT", "@P0 EXIT", "FADD R4, R4, 1", "EXIT")
    count = "ATOMG.E.INC.STRONG.GPU PT, R3, desc[UR4][R2.64], R5"
    launch = Launch((4, 1, 1), (32, 1, 1), b"")
    for first, blocks_that_add in ((count, [3]), ("LDG.E R3, desc[UR4][R2.64]", [0, 1, 2, 3])):
        code = Code(assembled(*(line.format(first) for line in kernel)))
        traces = [Follower(code, launch, block, 0).follow((500.0,)) for block in range(4)]
        assert [block for block, trace in enumerate(traces) if trace.issued["fp32"]] == blocks_that_add


def test_turns_of_banks_by_brute_force():
    draw = random.Random(1)
    for width in (4, 8, 16):
        addresses = np.array([draw.randrange(0, 4096, width) for _ in range(LANES)])
        per_turn = LANES * 4 // width
        expected = []
        for first in range(0, LANES, per_turn):
            wanted: dict[int, set[int]] = {}
            for address in addresses[first : first + per_turn].tolist():
                for word in range(address // 4, (address + width) // 4):
                    wanted.setdefault(word % 32, set()).add(word)
            expected.append(max(map(len, wanted.values())))
        assert shared_turns(addresses, width) == expected


def test_units():
    names = {
        "IMAD.WIDE": "imad", "FFMA": "fp32", "LDG.E.128": "global", "LDS.64": "shared", "MUFU.EX2": "special",
        "ULDC.64": "uniform", "LOP3.LUT": "alu", "DADD": "fp64", "BRA": "control", "SHFL.BFLY": "shuffle",
    }  # fmt: skip
    for opcode, unit in names.items():
        (one,) = assembled(f"{opcode} R0, R1")
        assert pipe_of(one) == unit
