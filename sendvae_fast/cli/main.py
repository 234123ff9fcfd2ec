"""The sendvae command: finds the verb, reads its config, calls it, and turns failures into one line.

A verb is a module in this package with a docstring (its help), a dataclass `Config` (its options), `run(config)`, and
optionally `POSITIONAL`, the name of the option that may be given bare.
"""

import difflib
import importlib
import re
import sys
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

from sendvae_fast.config import config_parser, flag_keys, load_config, optional_groups, parse_overrides
from sendvae_fast.errors import UserError, needs_extra
from sendvae_fast.version import __version__

VERBS = {
    "demo": "run everything end to end on a small scale and write a report",
    "doctor": "say what this machine has and which backend each op uses",
    "data synth": "render a JPEG ImageFolder of scenes with known attributes",
    "data index": "look at every picture of a folder, tar shards or parquet files and write their catalog",
    "data check": "report what is odd or broken in a catalog",
    "data pack": "pack the samples of a catalog into WebDataset tar shards",
    "train vae": "stage 1: fine-tune (or train) an autoencoder, aligned with a foundation model",
    "convert": "write an autoencoder or a generator in the layout of another program",
    "cache-latents": "encode pictures once into latent shards",
    "train sit": "stage 2: train a SiT flow transformer with REPA on cached latents",
    "sample": "draw pictures from a trained SiT",
    "evaluate": "measure reconstructions, attribute probes and generation distance",
    "report": "write a run's offline HTML report",
    "config show": "print a fully resolved config",
}
EXTRAS = {"demo": "train,eval", "data": "data", "evaluate": "eval", "report": "eval"}
"""The extra of pyproject.toml that a verb needs, by the verb's first word; the others need `train`."""
NESTED_FILE_OPTION = re.compile(r"^ +--\S+ CONFIG\s+Path to a configuration file\.\n", re.MULTILINE)
NESTED_HELP_OPTION = re.compile(r"^ +--\S+\.help\s+Show the help for \S+ and exit\.\n", re.MULTILINE)
USAGE = "usage: sendvae VERB [--config FILE.yaml ...] [--key.subkey=value ...] [--debug] [--help]"


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0 done, 2 the user can mend it, 75 stopped by a signal and saved."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        return _dispatch([argument for argument in arguments if argument != "--debug"])
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        line = " ".join(str(error).split()) or "no message"
        print(f"error: unexpected {type(error).__name__}: {line} (run again with --debug for details)", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"sendvae_fast {__version__}")
        return 0
    verb, rest = _split_verb(arguments)
    if verb == "config show" and rest and not rest[0].startswith("-"):
        verb, rest = _split_verb(rest)
        print(_module("config show").show(*_read_arguments(_module(verb), rest)), end="")
        return 0
    if "-h" in rest or "--help" in rest or verb == "config show":
        print(_help(verb, _module(verb)))
        return 0
    module = _module(verb)
    with _needs_extra_of(verb):
        return module.run(load_config(*_read_arguments(module, rest))) or 0


def _split_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb, one word or two, and what follows it."""
    words = 2 if " ".join(arguments[:2]) in VERBS else 1
    verb = " ".join(arguments[:words])
    if verb not in VERBS:
        near = difflib.get_close_matches(arguments[0], [known.split()[0] for known in VERBS], n=1)
        meant = [f"`sendvae {known}`" for known in VERBS if known.split()[0] in near]
        hint = f"did you mean {' or '.join(meant)}?" if meant else "`sendvae --help` lists the verbs"
        raise UserError(f"there is no verb {arguments[0]!r}; {hint}")
    return verb, arguments[words:]


def _module(verb: str) -> ModuleType:
    # Imported only now: torch and its friends take seconds, and no verb needs the others' imports.
    with _needs_extra_of(verb):
        return importlib.import_module("sendvae_fast.cli." + verb.replace(" ", "_").replace("-", "_"))


def _needs_extra_of(verb: str) -> AbstractContextManager[None]:
    return needs_extra(EXTRAS.get(verb.split()[0], "train"), f"`sendvae {verb}`")


def _read_arguments(module: ModuleType, arguments: list[str]) -> tuple[type, list[Path], dict]:
    """What `load_config` takes, from a verb's command line."""
    positional = getattr(module, "POSITIONAL", None)
    if positional and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{positional}={arguments[0]}", *arguments[1:]]
    files, others = _split_config_files(arguments)
    return module.Config, files, parse_overrides(others, flag_keys(module.Config))


def _split_config_files(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The values of every `--config FILE` and the other arguments."""
    files, others = [], []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument == "--config" and not pending:
            raise UserError("--config needs a file, as in --config configs/demo/vae.yaml")
        if argument == "--config":
            files.append(Path(pending.pop(0)))
        elif argument.startswith("--config="):
            files.append(Path(argument.partition("=")[2]))
        else:
            others.append(argument)
    return files, others


def _overview() -> str:
    width = max(map(len, VERBS))
    title = f"sendvae_fast {__version__}: train Send-VAE autoencoders and the generators on top of them"
    lines = [title, "", USAGE, ""]
    lines += [f"  {verb:<{width}}  {help_line}" for verb, help_line in VERBS.items()]
    lines += ["", "`sendvae VERB --help` lists a verb's options."]
    lines += ["On several ranks: torchrun --nproc-per-node N -m -- sendvae_fast VERB ..."]
    return "\n".join(lines)


def _help(verb: str, module: ModuleType) -> str:
    title = (module.__doc__ or "").strip()
    if not hasattr(module, "Config"):
        return f"usage: sendvae {verb} VERB [options of VERB]\n\n{title}"
    positional = getattr(module, "POSITIONAL", None)
    bare = f"[{positional.upper()}] " if positional else ""
    parser = config_parser(module.Config, prog=f"sendvae {verb}")
    options = parser.format_help().partition("options:\n")[2]
    for key, group in optional_groups(module.Config):
        own = config_parser(group, key).format_help()
        options += own[own.index("message and exit.\n") + len("message and exit.\n") :]
    # jsonargparse offers a config file and a help for every nested group; here --config reads whole files.
    for unwanted in (NESTED_FILE_OPTION, NESTED_HELP_OPTION):
        options = unwanted.sub("", options)
    kept = [line for line in options.splitlines() if "--help" not in line]
    shared = [
        "  --config FILE         a YAML file with any of the keys below; may be given several times",
        "  --debug               on a failure, show the traceback",
    ]
    head = f"usage: sendvae {verb} {bare}[--config FILE ...] [--key.subkey=value ...]"
    return re.sub(r"\n{3,}", "\n\n", "\n".join([head, "", title, "", "options:", *shared, *kept])).rstrip()


if __name__ == "__main__":
    sys.exit(main())
