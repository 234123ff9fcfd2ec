"""What SASS instructions do to a warp's registers, as far as addresses and branches depend on them.

An instruction that is not here makes its result unknown. Meanings are those of the public PTX instructions that ptxas
translates to them; in tests they are compared with plain arithmetic.
"""

from collections.abc import Callable

from bench.prediction import comparisons, floats, integers, moves
from bench.prediction.effects import Effect, forget_results
from bench.prediction.sass import Instruction
from sendvae_fast.errors import UserError

BUILDERS: dict[str, Callable[[Instruction], Effect]] = {
    "IMAD": integers.imad,
    "IADD3": integers.iadd3,
    "IADD": integers.iadd3,
    "VIADD": integers.iadd3,
    "LEA": integers.lea,
    "SHF": integers.shf,
    "LOP3": integers.lop3,
    "PRMT": integers.prmt,
    "SEL": moves.choose,
    "FSEL": lambda one: moves.choose(one, floating=True),
    "IMNMX": integers.min_max,
    "VIMNMX": integers.min_max,
    "IABS": integers.iabs,
    "MOV": moves.move,
    "HFMA2": moves.move_halves,
    "P2R": moves.pack_predicates,
    "R2P": moves.unpack_predicates,
    "R2UR": moves.broadcast,
    "CS2R": moves.clear,
    "LDC": moves.load_constant,
    "ISETP": comparisons.compare,
    "FSETP": comparisons.compare,
    "PLOP3": comparisons.plop3,
    "FADD": floats.fadd,
    "FMUL": floats.fmul,
    "FFMA": floats.ffma,
    "MUFU": floats.mufu,
    "I2F": floats.to_float,
    "I2FP": floats.to_float,
    "F2I": floats.to_integer,
}


def effect_of(one: Instruction) -> Effect:
    """What the instruction does, its predicate left aside; uniform instructions are like those of lanes.

    Raises:
        UserError: operands of a form that is not known here.
    """
    try:
        return BUILDERS.get(one.base.removeprefix("U"), forget_results)(one)
    except (AssertionError, IndexError, KeyError, StopIteration, ValueError) as error:
        raise UserError(f"machine code that predictions cannot read: {one.opcode} {', '.join(one.operands)}") from error
