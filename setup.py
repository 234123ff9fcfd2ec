"""Builds the compiled parts of sendvae_fast with CMake and Ninja; the rest is in pyproject.toml and CMakeLists.txt.

    pip install -e . --no-build-isolation        into sendvae_fast/_lib; again after a change in csrc/
    pip wheel . --no-build-isolation --no-deps   a wheel with the libraries; `make wheel` makes one for others

The package works without its compiled parts (on Triton and plain PyTorch), so a failing build is one warning, not a
failed installation. Environment:

    SENDVAE_BUILD               1 (default); 0 installs without compiled parts; require makes a failing build an error
    SENDVAE_BUILD_CUDA          auto (default: where nvcc is found); 0 never; 1 fails the build without nvcc
    SENDVAE_CUDA_ARCHITECTURES  CMake's list, default "80-real;90-real;100"; "native" is quick on a machine with a GPU
    SENDVAE_VERBOSE             1 shows the compiler's commands and ptxas's register report
    CUDACXX, CXX                the compilers, if not the first in PATH
    MAX_JOBS                    parallel compiler runs, default by free cores and memory

`sendvae doctor` says what was built and, if something is missing, why.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
BINARY_DIR = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # kept: Ninja then sees what changed
LIBRARY_DIR = Path("sendvae_fast", "_lib")
NOT_BUILT = "not_built.txt"  # in it, where there are no libraries: why, for `sendvae doctor` and the header of a run
COMPILERS = ("c++", "g++", "clang++", "icpx")
GIB = 1024**3
MEMORY_PER_JOB = 2 * GIB  # nvcc on one of our files stays below this


class BuildError(Exception):
    """The compiled parts cannot be built; the message is one line."""


def job_count(environment=os.environ, proc=Path("/proc"), cgroup=Path("/sys/fs/cgroup")) -> int:
    """Compiler runs to start in parallel: MAX_JOBS, else what cores and free memory allow, at least 1.

    Cores are those this process may run on (not the machine's), memory is the least of the machine's and of every
    control group that this process is in, as batch systems and containers set them.
    """
    if wanted := environment.get("MAX_JOBS"):
        if not wanted.isdecimal() or int(wanted) == 0:
            raise BuildError(f"MAX_JOBS must be a positive number, got {wanted!r}")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = available_memory(proc, cgroup)
    return cores if memory is None else max(1, min(cores, memory // MEMORY_PER_JOB))


def available_memory(proc: Path, cgroup: Path) -> int | None:
    """Free memory in bytes, or None where the system does not say.

    proc, cgroup: where the kernel's process files and its control groups are mounted.
    """
    known = [free for directory in memory_groups(proc, cgroup) if (free := free_in_group(directory)) is not None]
    meminfo = text_of(proc / "meminfo")
    if found := re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.MULTILINE):
        known.append(int(found[1]) * 1024)
    return min(known, default=None)


def memory_groups(proc: Path, cgroup: Path) -> list[Path]:
    """The directories of this process's memory control group and of all groups around it, whichever may exist.

    /proc/self/cgroup has lines "0::/path" (version 2) and "4:memory:/path" (version 1). Any level may have a limit.
    In a container the path can be one of the host's, which is not mounted there; the group at the top then is its own.
    """
    directories = [cgroup, cgroup / "memory"]
    for hierarchy, controllers, path in re.findall(
        r"^(\d+):([^:]*):/(.*)$", text_of(proc / "self/cgroup"), re.MULTILINE
    ):
        if hierarchy == "0" or "memory" in controllers.split(","):
            top = cgroup if hierarchy == "0" else cgroup / "memory"
            names = Path(path).parts
            directories += [top.joinpath(*names[:depth]) for depth in range(1, len(names) + 1)]
    return list(dict.fromkeys(directories))


def free_in_group(directory: Path) -> int | None:
    """Bytes that one control group may still take, or None without a limit; file cache counts as free."""
    for limit_file, usage_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),  # version 2
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
    ):
        limit, usage = text_of(directory / limit_file).strip(), text_of(directory / usage_file).strip()
        if limit.isdecimal() and usage.isdecimal():  # a limit of "max" is none
            found = re.search(rf"^{cache} (\d+)", text_of(directory / "memory.stat"), re.MULTILINE)
            return max(0, int(limit) - int(usage) + (int(found[1]) if found else 0))
    return None


def text_of(path: Path) -> str:
    """A file's text, empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def torch_package() -> Path:
    """Directory of the torch package, found without importing it (seconds, and a CUDA start-up)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed; install it first and pass --no-build-isolation to pip")
    return Path(next(iter(spec.submodule_search_locations)))


def tool(name: str) -> str:
    """Path of cmake or ninja, the one of this Python environment first."""
    directories = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    path = shutil.which(name, path=directories)
    if path is None:
        raise BuildError(f"{name} was not found; pip install {name}")
    return path


def check_compiler() -> None:
    """Say at once that there is no C++ compiler, where CMake would say so after a page of its own."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(shutil.which(name) for name in named or COMPILERS):
        who = f"CXX={named[0]} is none" if named else f"none of {', '.join(COMPILERS)} is in PATH"
        raise BuildError(f"no C++ compiler was found ({who}): apt install g++, or set CXX, and install again")


def cmake_arguments() -> list[str]:
    """Settings for CMakeLists.txt from the environment."""
    cuda_choices = {"auto": "auto", "0": "OFF", "1": "ON"}
    cuda = os.environ.get("SENDVAE_BUILD_CUDA", "auto")
    if cuda not in cuda_choices:
        raise BuildError(f"SENDVAE_BUILD_CUDA must be auto, 0 or 1, got {cuda!r}")
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "SENDVAE_CUDA": cuda_choices[cuda],
        "SENDVAE_PTXAS_VERBOSE": "ON" if os.environ.get("SENDVAE_VERBOSE") == "1" else "OFF",
        "SENDVAE_TORCH_DIR": torch_package().as_posix(),
        "SENDVAE_TORCH_VERSION": importlib.metadata.version("torch"),
    }
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError("pybind11 was not found; pip install pybind11")
    import pybind11

    settings["pybind11_DIR"] = pybind11.get_cmake_dir()
    # An empty value would override the default of CMakeLists.txt; dropping it lets a changed mind take effect.
    architectures = os.environ.get("SENDVAE_CUDA_ARCHITECTURES")
    unset = [] if architectures else ["-USENDVAE_CUDA_ARCHITECTURES"]
    if architectures:
        settings["SENDVAE_CUDA_ARCHITECTURES"] = architectures
    return [*unset, *(f"-D{name}={value}" for name, value in settings.items())]


def run(*command: str) -> None:
    """Run a build tool; its output goes on, the exception carries one line."""
    if os.environ.get("SENDVAE_VERBOSE") == "1":
        print("sendvae_fast:", " ".join(command), flush=True)
    try:
        subprocess.run(command, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"{Path(command[0]).name} failed; is there a C++20 compiler (apt install g++)? pip -v shows the details"
        ) from error


def build(binary_dir: Path, destination: Path) -> None:
    """Configure, compile and install into `destination`. Repeats only what changed since the last time."""
    check_compiler()
    cmake, jobs = tool("cmake"), job_count()
    destination.mkdir(parents=True, exist_ok=True)
    print(f"sendvae_fast: building the compiled ops, {jobs} files at a time", flush=True)
    run(cmake, "-S", str(ROOT), "-B", str(binary_dir), "-G", "Ninja", *cmake_arguments())
    verbose = ["--verbose"] if os.environ.get("SENDVAE_VERBOSE") == "1" else []
    run(cmake, "--build", str(binary_dir), "--parallel", str(jobs), *verbose)
    run(cmake, "--install", str(binary_dir), "--prefix", str(destination))
    installed = {Path(line).name for line in (binary_dir / "install_manifest.txt").read_text().splitlines()}
    for library in destination.glob("*.so"):
        if library.name not in installed:  # of another Python, or a CUDA library since switched off
            library.unlink()


class CMakeBuild(build_ext):
    """build_ext that hands the whole work to CMake; the extension it is given stands for all three libraries."""

    def run(self) -> None:
        note = self._destination() / NOT_BUILT
        note.unlink(missing_ok=True)
        try:
            build(BINARY_DIR, self._destination())
        except BuildError as error:
            if os.environ.get("SENDVAE_BUILD") == "require":
                raise SystemExit(f"sendvae_fast: {error}") from error
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{error}\n")
            print(
                f"sendvae_fast: WARNING: installed without compiled ops (they run on Triton or PyTorch): {error}",
                file=sys.stderr,
            )

    def get_outputs(self) -> list[str]:
        return sorted(str(path) for path in self._destination().glob("*.so"))

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an in-place build has no copies elsewhere

    def _destination(self) -> Path:
        return ROOT / LIBRARY_DIR if self.inplace else Path(self.build_lib).resolve() / LIBRARY_DIR


def build_tag(facts: str) -> str:
    """A wheel's build tag, "1cu130" or "1cpu", from the header of facts that CMake wrote."""
    if not re.search(r"^#define SENDVAE_BUILD_HAS_CUDA 1$", facts, re.MULTILINE):
        return "1cpu"
    major, minor = re.search(r'^#define SENDVAE_BUILD_CUDA_VERSION "(\d+)\.(\d+)', facts, re.MULTILINE).groups()
    return f"1cu{major}{minor}"


class NamedWheel(bdist_wheel):
    """bdist_wheel with the CUDA version of the compiled ops in its name, as the build tag.

    Where an index has several, pip takes the highest: cu130 before cu126 before cpu.
    """

    def get_tag(self) -> tuple[str, str, str]:
        # Asked for when all is built, and before the name is made.
        if self.build_number is None and self.get_finalized_command("build_ext").get_outputs():
            self.build_number = build_tag(text_of(BINARY_DIR / "generated" / "build_facts.h"))
        return super().get_tag()


def commit() -> str:
    """The commit that is being built, empty where there is neither a checkout nor a source package made in one."""
    if not (ROOT / ".git").exists():
        return text_of(ROOT / "sendvae_fast" / "commit.txt").strip()
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= (modified)"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def note_commit(root: Path) -> None:
    """Write it into a built package, where it is known."""
    if known := commit():
        Path(root, "sendvae_fast", "commit.txt").write_text(known + "\n")


class SourcesWithCommit(sdist):
    """sdist that also notes the commit, which its wheel cannot ask for."""

    def make_release_tree(self, base_dir, files) -> None:
        super().make_release_tree(base_dir, files)
        note_commit(Path(base_dir))


class BuildWithConfigs(build_py):
    """build_py that also puts the commit and configs/ into the package, where it looks for them.

    Not in an editable install: that reads them where they are.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            note_commit(Path(self.build_lib))
            for source in sorted((ROOT / "configs").rglob("*.yaml")):
                target = Path(self.build_lib, "sendvae_fast", source.relative_to(ROOT))
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


if __name__ == "__main__":
    wanted = os.environ.get("SENDVAE_BUILD", "1") != "0"
    setup(
        cmdclass={
            "bdist_wheel": NamedWheel,
            "build_ext": CMakeBuild,
            "build_py": BuildWithConfigs,
            "sdist": SourcesWithCommit,
        },
        ext_modules=[Extension("sendvae_fast._lib._host", sources=[])] if wanted else [],
    )
