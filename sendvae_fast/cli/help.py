"""Help texts of the command: the overview, the verbs of a group, and the short or complete help of a verb."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType

from sendvae_fast.cli.options import Option, config_options
from sendvae_fast.config import takes_several
from sendvae_fast.version import __version__

GENERAL = (
    ("--config NAME", "a packaged config (`sendvae config list`) or a YAML file", ""),
    ("--allow_network", "fetch weights that are given as hf:USER/NAME from the Hugging Face hub", ""),
    ("--debug", "on a failure, show the traceback", ""),
)
MAX_INDENT = 36
MIN_WIDTH, MAX_WIDTH = 80, 110
LEAST_TEXT = 30
"""Characters of a description in a short help; a default that leaves fewer is left out."""
MANY = 18
"""Options in a short help from which on each has one line."""


def overview(verbs: Mapping[str, str]) -> str:
    """The help of `sendvae` itself. verbs: what each verb does, in one line."""
    return "\n".join(
        [
            f"sendvae_fast {__version__}: train Send-VAE autoencoders and the generators on top of them",
            "",
            "usage: sendvae VERB [--config NAME ...] [--key.subkey=value ...] [--debug] [--help]",
            "",
            *_verb_lines(verbs),
            "",
            "`sendvae VERB --help` says how to use a verb.",
            "On several ranks: torchrun --nproc-per-node N -m -- sendvae_fast VERB ...",
        ]
    )


def group_help(group: str, verbs: Mapping[str, str]) -> str:
    """The verbs that start with the word `group`."""
    members = {verb: line for verb, line in verbs.items() if verb.split()[0] == group}
    usage = f"usage: sendvae {group} {{{','.join(verb.split()[1] for verb in members)}}} ..."
    return "\n".join([usage, "", *_verb_lines(members), "", f"`sendvae {group} VERB --help` says how to use one."])


def verb_help(verb: str, module: ModuleType, complete: bool) -> str:
    """The help of a verb: its docstring and its options.

    complete: show every option with its whole description; otherwise the required ones and those in the module's
    `MAIN_OPTIONS` with their first sentence, or all of them where there is no `MAIN_OPTIONS`.
    """
    title = (module.__doc__ or "").strip()
    if not hasattr(module, "Config"):
        return f"usage: sendvae {verb} VERB [options of VERB]\n\n{title}"
    positional = getattr(module, "POSITIONAL", None)
    bare = ""
    if positional:
        several = positional != "config" and takes_several(module.Config, positional)
        bare = f"[{positional.upper()}{' ...' if several else ''}] "
    lines = [f"usage: sendvae {verb} {bare}[--config NAME ...] [--key.subkey=value ...]", "", title]
    options = {option.key: option for option in config_options(module.Config)}
    sections: dict[str, list[tuple[str, str, str]]] = {}
    if complete:
        for option in options.values():
            sections.setdefault(option.section.removesuffix(".") or "options", []).extend(
                _option_entries([option], complete)
            )
        sections["always"] = [*GENERAL]
    else:
        main = getattr(module, "MAIN_OPTIONS", tuple(options))
        required = [option for option in options.values() if option.required]
        often = [options[key] for key in main if not options[key].required]
        sections["required"] = _option_entries(required, complete)
        sections["often used"] = _option_entries(often, complete)
        sections["always"] = [
            *GENERAL,
            ("--help=all", f"all options ({len(options)}), each with its whole description", ""),
        ]
    return "\n".join([*lines, *_sections(sections, complete)])


def _verb_lines(verbs: Mapping[str, str]) -> list[str]:
    width = max(map(len, verbs))
    return [f"  {verb:<{width}}  {line}" for verb, line in verbs.items()]


def _option_entries(options: Iterable[Option], complete: bool) -> list[tuple[str, str, str]]:
    """For each option: the text to type, its description, and its default or "(required)"."""
    entries = []
    for option in options:
        default = "" if option.default is None else f"(default: {option.default})"
        remark = "(required)" if option.required and complete else default
        entries.append((f"--{option.key} {option.kind}", option.description, remark))
    return entries


def _sections(sections: Mapping[str, Sequence[tuple[str, str, str]]], complete: bool) -> list[str]:
    """Headings, each above a column of texts to type and one of descriptions; a long text to type has its own line.

    complete: whole descriptions, else as much of their first sentences as fits: in one line if there are many, or two.
    """
    longest = max(len(name) for entries in sections.values() for name, *_ in entries)
    indent = min(longest + 4, MAX_INDENT)
    width = min(max(shutil.get_terminal_size((100, 0)).columns, MIN_WIDTH), MAX_WIDTH)
    num_lines = 1 if sum(map(len, sections.values())) > MANY else 2
    lines = []
    for heading, entries in sections.items():
        if entries:
            lines += ["", *textwrap.wrap(f"{heading}:", width)]
        for name, text, remark in entries:
            start = f"  {name}".ljust(indent)
            if len(name) + 4 > indent:
                lines, start = [*lines, start.rstrip()], " " * indent
            if not complete:
                room = num_lines * (width - indent)
                remark = remark if len(remark) <= room - LEAST_TEXT else ""  # the complete help has it
                text = _first_sentence(text, room - len(f" {remark}"))
            body = f"{text} {remark}".strip()
            lines += textwrap.wrap(
                body, width, initial_indent=start, subsequent_indent=" " * indent, break_on_hyphens=False
            )
    return lines


def _first_sentence(text: str, length: int) -> str:
    """The first sentence of a description, without its full stop; cut where it is longer than `length`."""
    sentence, dot, _ = text.partition(". ")
    sentence = sentence if dot else text.removesuffix(".")
    return textwrap.shorten(sentence.partition("; ")[0], length, placeholder=" ...")
