"""The sendvae command: finds the verb, reads its config, calls it, and turns failures into one line.

A verb is a module in this package with a docstring (its help), a dataclass `Config` (its options) and `run(config)`;
one of `OF_VERBS` has `run_for(config_class, files, overrides)` in its place, for the verb that follows it;
optionally `POSITIONAL`, the name of the option that may be given bare (several times where it is a tuple; "config" is a
config file), and `MAIN_OPTIONS`, the options beside the required ones that its short help shows (without it: all).

Its help and the reading of its options need no torch, which takes seconds: what does the work is imported in `run`.
"""

import difflib
import errno
import importlib
import io
import os
import re
import select
import sys
import traceback
from contextlib import AbstractContextManager
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

from sendvae_fast import hub
from sendvae_fast.cli.help import group_help, overview, verb_help
from sendvae_fast.config import flag_keys, load_config, merge, parse_overrides, takes_several
from sendvae_fast.engine.launch import adopt_slurm
from sendvae_fast.errors import UserError, needs_extra
from sendvae_fast.version import __version__

VERBS = {
    "demo": "run everything end to end on a small scale and write a report",
    "compare": "train several autoencoders, the same generator on each, and put them on one page",
    "doctor": "say what this machine has and which backend each op uses",
    "data synth": "render a JPEG ImageFolder of scenes with known attributes",
    "data index": "look at every picture of a folder, tar shards or parquet files and write their catalog",
    "data check": "report what is odd or broken in a catalog",
    "data pack": "pack the samples of a catalog into WebDataset tar shards",
    "train vae": "stage 1: fine-tune (or train) an autoencoder, aligned with a foundation model",
    "convert": "write an autoencoder or a generator in the layout of another program",
    "cache-latents": "encode pictures once into latent shards",
    "train sit": "stage 2: train a SiT flow transformer with REPA on cached latents",
    "train e2e": "REPA-E: train an autoencoder and the generator on its latents together",
    "plan": "say what a training run would need: memory, time, money, disk",
    "weights list": "list the published files that configs need, with licence and hash",
    "weights fetch": "print the commands that fetch them, or fetch them",
    "weights check": "look at all weights that a command names",
    "sample": "draw pictures from a trained SiT",
    "evaluate generation": "measure how far generated pictures are from real ones",
    "evaluate reconstruction": "measure what an autoencoder loses of held-out pictures",
    "evaluate attributes": "measure how well linear probes read attributes off latents",
    "evaluate latents": "measure how learnable a latent space is, without a generator",
    "evaluate traversals": "move latents along attributes and see which of them change",
    "evaluate correlation": "draw how measures of autoencoders go with how well they generate",
    "downstream": "segment latents and tell their depth, by heads of a foundation model",
    "play": "try trained networks by hand in a browser",
    "runs": "list training runs: state, step, end, loss, size",
    "report": "write a run's offline HTML report",
    "config list": "list the configs that come with the package",
    "config show": "print a fully resolved config",
}
GROUPS = frozenset(verb.split()[0] for verb in VERBS if " " in verb)
"""First words of the verbs of two words."""
FLAGS = ("--debug", "--allow_network")
"""Taken by every verb."""
HELP = ("-h", "--help", "--help=all", "help")
OF_VERBS = ("config show", "plan", "weights check")
"""Verbs that are followed by another one, whose options they read."""
EXTRAS = {
    "compare": "train,eval",
    "demo": "train,eval",
    "data": "data",
    "downstream": "train,eval",
    "evaluate": "eval",
    "play": "eval,play",
    "report": "eval",
}
"""The extra of pyproject.toml that a verb needs, by the verb's first word; the others need `train`."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = re.compile("not enough memory|can't allocate memory|Unable to allocate|CUDA out of memory")
"""In the errors of PyTorch on a CPU, NumPy, and PyTorch on a GPU where it wraps its own."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 2 the user can mend it, 75 stopped by a signal and saved."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # as with `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):  # a path is bytes, and need not be text: it is shown, escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if arguments and arguments[0].startswith("--local_rank="):
        del arguments[0]  # DeepSpeed's launcher puts it before the verb; LOCAL_RANK says the same
    debug = "--debug" in arguments
    if "--allow_network" in arguments:
        os.environ[hub.ALLOWED] = "1"  # the environment, so that processes of this one may, too
    try:
        adopt_slurm()
        code = _dispatch([argument for argument in arguments if argument not in FLAGS])
        sys.stdout.flush()
        return code
    except UserError as error:
        if debug:
            traceback.print_exc()
        if not _is_said(str(error)):
            print(f"{_rank_words()}error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
        return 0
    except Exception as error:
        if debug:
            raise
        known = _what_the_machine_lacks(error)
        line = known or f"unexpected {type(error).__name__}: {UserError(error)} (run again with --debug for details)"
        print(f"{_rank_words()}error: {line}", file=sys.stderr)
        return UserError.exit_code if known else 1


def _what_the_machine_lacks(error: Exception) -> str | None:
    """What the user can mend of a failure that may come from any call: memory, or a file's name, place or disk."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"cannot use {UserError(os.fsdecode(error.filename))}: {error.strerror}; check the path and its disk"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"cannot write: {error.strerror}; make room there and run the same command again"
    words = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY.search(words):
        return (
            f"not enough memory ({UserError(words.partition('.')[0] or 'refused')}): make the batch, the pictures or "
            "the networks smaller; in training raise engine.accumulation_steps or lower data.cache_mb; run the same "
            "command again to go on"
        )
    return None


def _rank_words() -> str:
    """The beginning of a message that names its rank; empty for a single rank."""
    return f"rank {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ else ""


def _is_said(message: str) -> bool:
    """Whether the first of several ranks says the same: what all have is said once."""
    if not _rank_words():
        return False
    from sendvae_fast.engine.distributed import says_as_first_rank

    return says_as_first_rank(message)


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as in `sendvae --help | head -1`."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in HELP:
        print(overview(VERBS))
        return 0
    if arguments[0] == "--version":
        print(f"sendvae_fast {__version__}")
        return 0
    if arguments[0] in GROUPS and (len(arguments) == 1 or arguments[1] in HELP):
        print(group_help(arguments[0], VERBS))
        return 0
    verb, rest = _split_verb(arguments)
    if verb in OF_VERBS and rest and not rest[0].startswith("-"):
        return _run_for(verb, *_split_verb(rest))
    if verb.startswith("train ") and _says_that_it_is_finished(verb, rest):
        return 0
    module = _module(verb)
    if verb in OF_VERBS or any(word in rest for word in HELP[:-1]):
        complete = "--help=all" in rest or rest[-2:] == ["--help", "all"]
        print(verb_help(verb, module, complete))
        return 0
    with _needs_extra_of(verb):
        config = _load(module, rest)
        if verb.startswith("train "):
            from sendvae_fast.engine.signals import StopOnSignal

            StopOnSignal.ends_with_its_run()
        return module.run(config) or 0


def _run_for(verb: str, of_verb: str, rest: list[str]) -> int:
    """Run `config show`, `plan` or `weights check` for another verb's options, with its own beside them."""
    module, own = _module(verb), getattr(_module(verb), "Config", None)
    arguments = _read_arguments(_module(of_verb), rest, frozenset() if own is None else flag_keys(own))
    with _needs_extra_of(of_verb):
        return module.run_for(*arguments) or 0


def _says_that_it_is_finished(verb: str, arguments: list[str]) -> bool:
    with _needs_extra_of(verb):
        from sendvae_fast.cli.finished import words_of_finished_run
    words = words_of_finished_run(verb, *_split_config_files(arguments))
    if words is not None and os.environ.get("RANK", "0") == "0":
        print(words, file=sys.stderr)
    return words is not None


def _load(module: ModuleType, arguments: list[str]) -> Any:
    """A verb's config. An error in the command line occurs on every rank; only the first reports it."""
    try:
        return load_config(*_read_arguments(module, arguments))
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(error.exit_code) from error
        raise


def _split_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb, one word or two, and what follows it."""
    words = 2 if arguments[0] in GROUPS else 1
    verb = " ".join(arguments[:words])
    if verb not in VERBS:
        if near := difflib.get_close_matches(verb, VERBS, n=1):
            meant = near
        else:
            words_near = difflib.get_close_matches(arguments[0], [known.split()[0] for known in VERBS], n=1)
            meant = [known for known in VERBS if known.split()[0] in words_near]
        hint = f"did you mean {' or '.join(f'`sendvae {known}`' for known in meant)}?"
        raise UserError(f"there is no verb {verb!r}; {hint if meant else '`sendvae --help` lists the verbs'}")
    return verb, arguments[words:]


def _module(verb: str) -> ModuleType:
    # Imported only now: no verb needs the others' imports.
    with _needs_extra_of(verb):
        return importlib.import_module("sendvae_fast.cli." + verb.replace(" ", "_").replace("-", "_"))


def _needs_extra_of(verb: str) -> AbstractContextManager[None]:
    return needs_extra(EXTRAS.get(verb.split(maxsplit=1)[0], "train"), f"`sendvae {verb}`")


def _read_arguments(
    module: ModuleType, arguments: list[str], flags: frozenset[str] = frozenset()
) -> tuple[type, list[Path], dict]:
    """The arguments of `load_config`, from a verb's command line. flags: more keys that need no value."""
    positional, bare = getattr(module, "POSITIONAL", None), {}
    if positional == "config" and arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    elif positional and arguments and not arguments[0].startswith("-"):
        first = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
        several = takes_several(module.Config, positional)
        bare = {positional: first if several else first[0]}
        arguments = arguments[len(first) if several else 1 :]
    files, others = _split_config_files(arguments)
    return module.Config, files, merge(bare, parse_overrides(others, flag_keys(module.Config) | flags))


def _split_config_files(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The values of every `--config FILE` and the other arguments."""
    files, others = [], []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument == "--config" and not pending:
            raise UserError("--config needs a name or a file, as in --config vae/send_vae_f16d32")
        if argument == "--config":
            files.append(Path(pending.pop(0)))
        elif argument.startswith("--config="):
            files.append(Path(argument.partition("=")[2]))
        else:
            others.append(argument)
    return files, others


if __name__ == "__main__":
    sys.exit(main())
