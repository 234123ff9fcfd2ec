"""A hook of MkDocs: pages that are made from other files of the repository, so that nothing is written twice.

index, contributing, changelog, configs    README.md and its like, with links as the site needs them
reference/<package>                        the docstrings of the package's modules
reference/options                          every option of every verb, from the config dataclasses
"""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "configs.md",
    "examples/README.md": "examples.md",
    "bench/evidence/plan.md": "evidence_plan.md",
}
# Packages whose public names are re-exported by their `__init__`: they are documented under these names.
FLAT = ("ops", "nn")
# What is nobody's interface: the command line (its options have a page), compare, the demo, what is behind `ops`.
HIDDEN = ("cli", "compare", "demo", "attention", "triton", "_lib", "configs", "version")
OPTIONS_PREFACE = """Give options on the command line as `--key.subkey=value`, or in a YAML file as nested keys; the
command line wins. `sendvae config show VERB` prints them resolved."""
PACKAGE = griffe.load("sendvae_fast", search_paths=[str(ROOT)], docstring_parser="google")


def on_config(config):
    """Add the reference to the navigation, before the last entry."""
    pages = {"Options": "reference/options.md"}
    pages |= {name.removeprefix("sendvae_fast."): f"reference/{name}.md" for name in packages()}
    config.nav.insert(len(config.nav) - 1, {"Reference": [{title: page} for title, page in pages.items()]})
    return config


def on_files(files, config):
    """Add the generated pages to those that lie in docs/."""
    for source, page in COPIED.items():
        text = relink((ROOT / source).read_text(encoding="utf-8"))
        if source.startswith("examples/"):
            text += "\n" + scripts()
        files.append(File.generated(config, page, content=text))
    for name, modules in packages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=package_page(name, modules)))
    files.append(File.generated(config, "reference/options.md", content=options_page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of a page in docs/ to files at the root."""
    return markdown if page.file.generated_by else relink(markdown.replace("](../", "]("))


def relink(text: str) -> str:
    """Links of a file at the root as links between the site's pages."""
    for source, page in COPIED.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")


def scripts() -> str:
    """The examples whole, under their names."""
    sections = []
    for script in sorted((ROOT / "examples").glob("*.py")):
        sections += [f"## {script.stem}", "", "```python", script.read_text(encoding="utf-8").strip(), "```", ""]
    return "\n".join(sections)


def packages() -> dict[str, list[str]]:
    """Packages with a page, and the modules on it."""
    found = {}
    folders = [file.parent.relative_to(ROOT) for file in (ROOT / "sendvae_fast").glob("**/__init__.py")]
    for folder in sorted(folders, key=lambda folder: (len(folder.parts) > 1 and folder.parts[1] not in FLAT, folder)):
        if not set(folder.parts) & set(HIDDEN):
            stems = sorted({file.stem for file in (ROOT / folder).glob("[!_]*.py")} - set(HIDDEN))
            modules = [".".join((*folder.parts, stem)) for stem in stems]
            found[".".join(folder.parts)] = [] if set(folder.parts) & set(FLAT) else modules
    return found


def package_page(name: str, modules: list[str]) -> str:
    """The reference of a package: its docstring, then its modules, those that it exports from first; or its exports."""
    package = PACKAGE[name.partition(".")[2]] if "." in name else PACKAGE
    lines = [f"# {name}", "", package.docstring.value if package.docstring else "", ""]
    exported = exports(package)
    offered = {path.rpartition(".")[0] for path in exported.values()}
    for module in sorted(modules, key=lambda module: module not in offered):
        lines += [f"::: {module}", ""]
    for title, path in ({} if modules else exported).items():
        lines += [f"::: {path}", "    options:", f"      heading: {name}.{title}", f"      toc_label: {title}", ""]
    return "\n".join(lines)


def exports(package: griffe.Module) -> dict[str, str]:
    """Names in a package's `__all__`, and what they are imported from: to griffe `ops.adaln` is the module so named."""
    tree = ast.parse(package.filepath.read_text(encoding="utf-8"))
    origins = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = {name: origins.get(name, f"{package.path}.{name}") for name in sorted(map(str, package.exports or ()))}
    shown = packages()
    return {name: path for name, path in names.items() if path not in shown and not name.startswith("__")}


# ---- Options ----


def options_page() -> str:
    """Every verb's options: those of its `Config`, groups nested in it after it."""
    lines = ["# Options", "", OPTIONS_PREFACE, ""]
    verbs = ast.literal_eval(str(PACKAGE["cli.main.VERBS"].value))
    for verb, purpose in verbs.items():
        module = PACKAGE["cli." + re.sub("[ -]", "_", verb)]
        if "Config" in module.members:
            lines += [f"## sendvae {verb}", "", f"{purpose[0].upper()}{purpose[1:]}.", ""]
            lines += options_of(config_class(module, "Config"), "")
    return "\n".join(lines)


def config_class(scope: griffe.Object, name: str) -> griffe.Class | None:
    """The dataclass that a name means where it stands, imported there or an alias of another; None for other things."""
    try:
        found = PACKAGE[scope.resolve(name).removeprefix("sendvae_fast.")]
    except (griffe.NameResolutionError, KeyError):
        return None
    if found.is_attribute:
        return config_class(found.parent, str(found.value))
    return found.final_target if found.is_alias and found.final_target.is_class else found if found.is_class else None


def options_of(config: griffe.Class, prefix: str, given: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """A definition per option, then one section per group. `given`: defaults that differ from the class's own."""
    lines, groups = [], []
    for name, option in config.all_members.items():
        if not option.is_attribute or "instance-attribute" not in option.labels:  # a property or a ClassVar
            continue
        text = " ".join(option.docstring.value.split()) if option.docstring else ""
        kind, default = str(option.annotation), given.get(name, str(option.value))
        group = config_class(config, kind.removesuffix(" | None"))
        if group is not None and "dataclass" in group.labels:
            groups += ["", f"### {prefix}{name}", "", text + (" (null by default)" if default == "None" else ""), ""]
            groups += options_of(group, f"{prefix}{name}.", arguments_of_factory(default))
        else:
            required = option.value is None and name not in given
            lines += [f"`--{prefix}{name}{'' if required else f'={shown(default)}'}` ({kind_in_words(kind)})"]
            lines += [f":   {'Required. ' if required else ''}{text}", ""]
    return lines + groups


def arguments_of_factory(default: str) -> dict[str, str]:
    """The keyword arguments in `field(default_factory=lambda: X(a=1))`."""
    calls = [node for node in ast.walk(ast.parse(default, mode="eval")) if isinstance(node, ast.Lambda)]
    return {word.arg: ast.unparse(word.value) for call in calls for word in getattr(call.body, "keywords", ())}


def shown(default: str) -> str:
    """A default as the command line takes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(default, default.strip("'\""))


def kind_in_words(annotation: str) -> str:
    """`Literal['a', 'b'] | None` as `a, b or null`."""
    literal = re.match(r"Literal\[(.*)\](.*)", annotation)
    if literal:
        words = re.findall(r"'([^']*)'", literal[1]) + re.findall(r"None", literal[2])
    else:
        words = annotation.split(" | ")
    words = ["null" if word == "None" else word for word in words]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
