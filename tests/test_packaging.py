"""What is built, what is shipped, and what the libraries depend on."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from sendvae_fast.ops import library

ROOT = Path(__file__).resolve().parent.parent
OP_LIBRARIES = (library.CPU_LIBRARY, library.CUDA_LIBRARY)


@pytest.fixture
def setup_script():
    """setup.py as a module; nothing runs on import."""
    spec = importlib.util.spec_from_file_location("sendvae_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(name: str) -> Path:
    path = library.LIBRARY_DIR / name
    if not path.is_file():
        pytest.skip(f"{name} is not built")
    return path


def output_of(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


# ---- Sources ----


def test_every_source_is_listed_once():
    sources = {str(path.relative_to(ROOT)) for suffix in ("cpp", "cu") for path in ROOT.glob(f"csrc/**/*.{suffix}")}
    listed = re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text())
    assert sorted(listed) == sorted(sources)
    assert "csrc/" not in re.sub(r"csrc/$", "", (ROOT / "setup.py").read_text(), flags=re.M)


def included_files(source: Path, seen: set[Path]) -> set[str]:
    """Names of all includes of a source, following those of our own files."""
    names = set(re.findall(r'#include [<"]([^>"]+)[>"]', source.read_text()))
    for name in set(names):
        own = (source.parent / name).resolve()
        if own.is_file() and own not in seen:
            seen.add(own)
            names |= included_files(own, seen)
    return names


def test_host_module_includes_no_torch():
    names = included_files(ROOT / "csrc/host/host.cpp", set())
    assert "../common/philox.h" in names and "math.h" in names  # the search does follow includes
    assert not [name for name in names if re.match(r"(torch|ATen|c10|caffe2)/", name)]


def test_op_sources_include_the_stable_abi_only():
    for source in (*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.cu")):
        for name in included_files(source, set()):
            if re.match(r"(torch|ATen|c10|caffe2)/", name):
                assert re.match(r"torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/", name), (source, name)


# ---- Libraries ----


@pytest.mark.parametrize("name", OP_LIBRARIES)
def test_library_dependencies(name):
    """Only torch and the C and C++ run times: no Python, no dynamic CUDA run time, no paths of the build machine."""
    dynamic = output_of("readelf", "--dynamic", "--wide", built(name))
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", dynamic))
    torch_libraries = {"libtorch_cpu.so"} | ({"libtorch_cuda.so"} if name == library.CUDA_LIBRARY else set())
    assert torch_libraries <= needed
    run_times = r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux[-\w]*)\.so\.\d+"
    assert not [one for one in needed - torch_libraries if not re.fullmatch(run_times, one)]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert str(ROOT).encode() not in built(name).read_bytes()


@pytest.mark.parametrize("name", OP_LIBRARIES)
def test_library_uses_the_stable_abi_only(name):
    """No C++ symbol of torch is imported; those are what changes between versions."""
    symbols = output_of("nm", "--dynamic", "--undefined-only", built(name))
    assert "torch_library_impl" in symbols
    assert not re.findall(r"\b_Z\w*(?:2at|3c10|5torch)\w*", symbols)


def find_cuobjdump() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton carries."""
    if path := shutil.which("cuobjdump"):
        return path
    triton = importlib.util.find_spec("triton")
    carried = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(carried) if carried and carried.is_file() else None


def test_cuda_library_holds_its_architectures():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: the CUDA library is not built here")
    path, cuobjdump = built(library.CUDA_LIBRARY), find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's")
    info = library.host().build_info()
    wanted = {architecture.split("-")[0] for architecture in info["cuda_architectures"]}
    if "SENDVAE_CUDA_ARCHITECTURES" not in os.environ and not {"80", "90", "100"} <= wanted:
        pytest.skip(f"built for {sorted(wanted)} by choice")
    assert {f"sm_{one}" for one in wanted} == set(re.findall(r"\bsm_\d+", output_of(cuobjdump, "--list-elf", path)))


def test_cuda_library_loads():
    """Every symbol is found and the CUDA implementations register; that needs no GPU, only a torch with CUDA."""
    path = built(library.CUDA_LIBRARY)
    if not library.load() or not torch.backends.cuda.is_built():
        pytest.skip("needs the CPU library and a torch with CUDA")
    torch.ops.load_library(str(path))
    for op in ("noise_inject", "noise_inject_backward", "cosine_align", "cosine_align_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sendvae::{op}", "CUDA")


def test_status_names_a_reason(tmp_path, monkeypatch):
    """Without libraries every reason is one line that says what to do."""
    monkeypatch.setattr(library, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(library, "HOST_MODULE", "sendvae_fast._lib._no_such_module")
    library._load_all_ops.cache_clear()
    library._import_host.cache_clear()
    try:
        assert not library.load() and library.host() is None
        for reason in library.status().values():
            assert "not built" in reason and "pip install" in reason and "\n" not in reason
        (tmp_path / library.CPU_LIBRARY).write_bytes(b"not a library")
        library._load_all_ops.cache_clear()
        assert re.match(rf"{library.CPU_LIBRARY} does not load under torch \S+: .+$", library.status()["cpu"])
    finally:
        library._load_all_ops.cache_clear()
        library._import_host.cache_clear()


# ---- setup.py ----


def write_memory_files(folder: Path, available_kib: int, limit: str, usage: int) -> dict[str, Path]:
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    return {"cgroup": folder, "meminfo": folder / "meminfo"}


def test_job_count(setup_script, tmp_path, monkeypatch):
    gib = 2**30
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def jobs(**environment):
        return setup_script.job_count(environment, **files)

    files = write_memory_files(tmp_path, 64 * 2**20, "max", 0)
    assert jobs() == 8  # cores decide
    assert jobs(MAX_JOBS="3") == 3
    files = write_memory_files(tmp_path, 11 * 2**20, "max", 0)
    assert jobs() == 5  # free memory decides
    files = write_memory_files(tmp_path, 64 * 2**20, str(8 * gib), 2 * gib)
    assert jobs() == 3  # the control group decides
    files = write_memory_files(tmp_path, 64 * 2**20, str(2 * gib), 2 * gib)
    assert jobs() == 1
    assert setup_script.job_count({}, tmp_path / "none", tmp_path / "none") == 8
    with pytest.raises(setup_script.BuildError, match="MAX_JOBS must be a positive number, got 'all'"):
        jobs(MAX_JOBS="all")


def test_cmake_arguments(setup_script, monkeypatch):
    monkeypatch.setenv("SENDVAE_BUILD_CUDA", "0")
    monkeypatch.setenv("SENDVAE_CUDA_ARCHITECTURES", "native")
    arguments = setup_script.cmake_arguments()
    assert "-DSENDVAE_CUDA=OFF" in arguments and "-DSENDVAE_CUDA_ARCHITECTURES=native" in arguments
    monkeypatch.delenv("SENDVAE_CUDA_ARCHITECTURES")
    assert "-USENDVAE_CUDA_ARCHITECTURES" in setup_script.cmake_arguments()
    monkeypatch.setenv("SENDVAE_BUILD_CUDA", "yes")
    with pytest.raises(setup_script.BuildError, match="SENDVAE_BUILD_CUDA must be auto, 0 or 1"):
        setup_script.cmake_arguments()


def test_missing_compiler_is_one_line(setup_script, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(setup_script.BuildError) as caught:
        setup_script.build(tmp_path / "binary", tmp_path / "library")
    assert re.fullmatch(r"cmake failed; is there a C\+\+20 compiler .+", str(caught.value))
    assert "no-such-compiler" in capfd.readouterr().err


def build_command(setup_script, tmp_path):
    command = setup_script.CMakeBuild(Distribution({"name": "sendvae_fast"}))
    command.build_lib, command.inplace = str(tmp_path), False
    return command


def test_build_places_libraries_in_the_wheel(setup_script, tmp_path, monkeypatch):
    def fake_build(binary_dir, destination):
        destination.mkdir(parents=True)
        for name in (*OP_LIBRARIES, "_host.so"):
            (destination / name).touch()

    monkeypatch.setattr(setup_script, "build", fake_build)
    command = build_command(setup_script, tmp_path)
    command.run()
    assert {Path(path).relative_to(tmp_path.resolve()).as_posix() for path in command.get_outputs()} == {
        f"sendvae_fast/_lib/{name}" for name in (*OP_LIBRARIES, "_host.so")
    }


def test_failing_build_is_a_warning(setup_script, tmp_path, monkeypatch, capsys):
    def fake_build(binary_dir, destination):
        raise setup_script.BuildError("no compiler")

    monkeypatch.setattr(setup_script, "build", fake_build)
    monkeypatch.delenv("SENDVAE_BUILD", raising=False)
    command = build_command(setup_script, tmp_path)
    command.run()
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "WARNING" in warning and "no compiler" in warning
    assert command.get_outputs() == []
    monkeypatch.setenv("SENDVAE_BUILD", "require")
    with pytest.raises(SystemExit, match="no compiler"):
        command.run()


def test_wheel_contents(tmp_path):
    """The package with its data files; no tests, no sources of the compiled parts. (Built without those: cheap.)"""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "sendvae_fast", tree / "sendvae_fast", ignore=shutil.ignore_patterns("_lib", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in ("csrc", "tests"):
        (tree / name).mkdir()
        (tree / name / "__init__.py").touch()
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)],
        cwd=tree, check=True, env={**os.environ, "SENDVAE_BUILD": "0"}, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {path.relative_to(tree).as_posix() for path in tree.glob("sendvae_fast/**/*") if path.is_file()}
