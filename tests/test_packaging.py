"""What is built, what is shipped, and what the libraries depend on."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from sendvae_fast.cli.doctor import look_at_ops
from sendvae_fast.cli.findings import Findings
from sendvae_fast.errors import UserError
from sendvae_fast.ops import dispatch, library, use_backend

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
    lists = re.findall(
        r"^set\(SENDVAE_\w+_SOURCES\n([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), flags=re.MULTILINE
    )
    listed = " ".join(lists).split()
    assert sorted(listed) == sorted(sources)
    assert "csrc/" not in re.sub(r"csrc/$", "", (ROOT / "setup.py").read_text(), flags=re.MULTILINE)


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


def stack_frames(cuobjdump: str, path: Path) -> dict[tuple[str, str], int]:
    """Bytes of stack that ptxas gave each kernel, by (architecture, mangled name): spilled registers lie there."""
    frames, architecture, kernel = {}, "", ""
    for line in output_of(cuobjdump, "--dump-resource-usage", path).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r" *Function (\S+):", line):
            kernel = found[1]
        elif found := re.match(r" *REG:\d+ STACK:(\d+)", line):
            frames[architecture, kernel] = int(found[1])
    return frames


def test_cuda_kernels_do_not_spill():
    path, cuobjdump = built(library.CUDA_LIBRARY), find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's")
    frames = stack_frames(cuobjdump, path)
    for op, backends in dispatch.OPS.items():
        if "cuda" in backends:
            assert any(op in kernel for _, kernel in frames), op
    assert all("sendvae" in kernel for _, kernel in frames)  # what gpu-check has compute-sanitizer look for
    assert not {kernel: size for kernel, size in frames.items() if size}


def test_a_spill_would_be_seen(tmp_path):
    """The report that the test above reads says what `ptxas -v` says, of a kernel that must spill."""
    nvcc, cuobjdump = shutil.which("nvcc"), find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        pytest.skip("needs nvcc and cuobjdump")
    source, cubin = tmp_path / "spill.cu", tmp_path / "spill.cubin"
    source.write_text("""
        __global__ void kernel(const float* in, float* out) {
          float x[64];
          #pragma unroll
          for (int i = 0; i < 64; ++i) x[i] = in[i * blockDim.x + threadIdx.x];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 64; ++i) out[(63 - i) * blockDim.x + threadIdx.x] = x[i] * x[63 - i];
        }""")
    command = [nvcc, "-cubin", "-arch=sm_90", "-maxrregcount=32", "-Xptxas=-v", str(source), "-o", str(cubin)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stack, spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report).groups()
    assert int(spilled) > 0
    assert list(stack_frames(cuobjdump, cubin).values()) == [int(stack)]


def test_cuda_library_loads():
    """Every symbol is found and the CUDA implementations register; that needs no GPU, only a torch with CUDA."""
    path = built(library.CUDA_LIBRARY)
    if not library.load() or not torch.backends.cuda.is_built():
        pytest.skip("needs the CPU library and a torch with CUDA")
    torch.ops.load_library(str(path))
    for op, backends in dispatch.OPS.items():
        if "cuda" in backends:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sendvae::{op}", "CUDA"), op


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


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with this one's CPU library and no sources yet."""
    folder = tmp_path / "sendvae_fast" / "_lib"
    folder.mkdir(parents=True)
    (folder / library.CPU_LIBRARY).symlink_to(built(library.CPU_LIBRARY))
    monkeypatch.setattr(library, "LIBRARY_DIR", folder)
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.delenv("SENDVAE_BACKEND", raising=False)
    caches = (library.stale, library._load_all_ops)
    for function in caches:
        function.cache_clear()
    yield tmp_path
    for function in caches:
        function.cache_clear()


def write_schemas(checkout: Path, text: str) -> None:
    path = checkout / library.SCHEMAS
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    library.stale.cache_clear()
    library._load_all_ops.cache_clear()


def test_a_library_of_other_sources_must_be_built_again(checkout):
    text = (ROOT / library.SCHEMAS).read_text()
    assert library.stale() is None  # an installed wheel: no sources beside it
    write_schemas(checkout, "// another comment\n" + text)
    assert library.stale() is None and library.load()
    changed = text.replace("float? margin, bool mean)", "float? margin, bool mean, int of_tomorrow)")
    assert changed != text
    write_schemas(checkout, changed)
    with pytest.raises(UserError) as raised:
        dispatch.chosen_backend("noise_inject", "cpu")
    said = str(raised.value)
    assert "\n" not in said and said == library.status()["cpu"] and not library.load()
    for words in (
        str(checkout / library.SCHEMAS),
        "cosine_align is another",
        f"pip install -v --no-build-isolation --no-deps -e {checkout}",
    ):
        assert words in said
    with use_backend("reference"):
        assert dispatch.chosen_backend("noise_inject", "cpu") == "reference"
    findings = Findings()
    look_at_ops(findings)
    assert findings.exit_code == 2


def test_all_schemas_are_compared():
    """As many as there are calls, each whole, as PyTorch reads it."""
    text = (ROOT / library.SCHEMAS).read_text()
    schemas = library.schemas(text)
    assert len(schemas) == text.count("library.def(") > len(dispatch.OPS)
    assert {torch._C.parse_schema(schema).name for schema in schemas} >= dispatch.OPS.keys()


# ---- setup.py ----


GIB = 2**30


class FakeSystem:
    """The kernel's files on memory, in a folder."""

    def __init__(self, folder: Path, available_gib: int, cgroup_lines: str = "0::/\n"):
        self.proc, self.cgroup = folder / "proc", folder / "cgroup"
        self._write(self.proc / "meminfo", f"MemTotal: 99999999 kB\nMemAvailable: {available_gib * 2**20} kB\n")
        self._write(self.proc / "self/cgroup", cgroup_lines)

    def limit(self, group: str, limit: int | str, usage: int, cache: int = 0) -> None:
        """Limit a control group of version 2."""
        self._write(self.cgroup / group / "memory.max", f"{limit}\n")
        self._write(self.cgroup / group / "memory.current", f"{usage}\n")
        self._write(self.cgroup / group / "memory.stat", f"file {2 * cache}\ninactive_file {cache}\n")

    def limit_v1(self, group: str, limit: int, usage: int) -> None:
        """Limit a control group of version 1."""
        self._write(self.cgroup / "memory" / group / "memory.limit_in_bytes", f"{limit}\n")
        self._write(self.cgroup / "memory" / group / "memory.usage_in_bytes", f"{usage}\n")

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def jobs(setup_script, monkeypatch):
    """job_count on a fake system of 8 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return lambda system, **environment: setup_script.job_count(environment, system.proc, system.cgroup)


def test_job_count(setup_script, jobs, tmp_path):
    system = FakeSystem(tmp_path, 64)
    assert jobs(system) == 8  # cores decide
    assert jobs(system, MAX_JOBS="3") == 3
    system.limit("", "max", 0)
    assert jobs(system) == 8
    assert jobs(FakeSystem(tmp_path, 11)) == 5  # free memory decides
    assert jobs(FakeSystem(tmp_path, 1)) == 1
    assert setup_script.job_count({}, tmp_path / "none", tmp_path / "none") == 8
    with pytest.raises(setup_script.BuildError, match="MAX_JOBS must be a positive number, got 'all'"):
        jobs(system, MAX_JOBS="all")


@pytest.mark.parametrize("group", ["", "jobs", "jobs/7", "jobs/7/step"])
def test_job_count_heeds_every_control_group_around_it(jobs, tmp_path, group):
    """The process is in jobs/7/step; a limit at any level binds it, one of another group does not."""
    system = FakeSystem(tmp_path, 64, "0::/jobs/7/step\n")
    for one in ("", "jobs", "jobs/7", "jobs/7/step"):
        system.limit(one, "max", 5 * GIB)
    system.limit("jobs/8", 2 * GIB, 0)
    assert jobs(system) == 8
    system.limit(group, 8 * GIB, 2 * GIB)
    assert jobs(system) == 3
    system.limit(group, 8 * GIB, 6 * GIB, cache=2 * GIB)
    assert jobs(system) == 2  # file cache gives way


def test_job_count_in_version_1_groups(jobs, tmp_path):
    system = FakeSystem(tmp_path, 64, "12:cpu,cpuacct:/a\n4:memory:/batch/3\n0::/\n")
    system.limit_v1("", 2**63 - 4096, GIB)
    system.limit_v1("a", 2 * GIB, 0)
    assert jobs(system) == 8
    system.limit_v1("batch/3", 9 * GIB, GIB)
    assert jobs(system) == 4


def test_job_count_where_the_path_is_the_hosts(jobs, tmp_path):
    """A container without a namespace of its own sees its group at the top, and its path as the host names it."""
    system = FakeSystem(tmp_path, 64, "0::/system.slice/docker-1.scope\n")
    system.limit("", 6 * GIB, 0)
    assert jobs(system) == 3


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


def test_missing_compiler_is_one_line(setup_script, tmp_path, monkeypatch):
    def said():
        with pytest.raises(setup_script.BuildError) as caught:
            setup_script.build(tmp_path / "binary", tmp_path / "library")
        return str(caught.value)

    monkeypatch.setenv("CXX", f"{tmp_path / 'no-such-compiler'} -m64")
    assert re.fullmatch(r"no C\+\+ compiler was found \(CXX=\S+no-such-compiler is none\): apt install g\+\+.+", said())
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert re.fullmatch(r"no C\+\+ compiler was found \(none of c\+\+, g\+\+, .+ is in PATH\): apt install .+", said())


def test_a_compiler_that_fails_is_one_line(setup_script, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CXX", shutil.which("false"))
    with pytest.raises(setup_script.BuildError, match=r"cmake failed; is there a C\+\+20 compiler .+") as caught:
        setup_script.build(tmp_path / "binary", tmp_path / "library")
    assert "\n" not in str(caught.value) and "/false" in capfd.readouterr().err


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
    assert (tmp_path / "sendvae_fast/_lib" / library.NOT_BUILT_FILE).read_text() == "no compiler\n"
    monkeypatch.setenv("SENDVAE_BUILD", "require")
    with pytest.raises(SystemExit, match="no compiler"):
        command.run()


@pytest.mark.parametrize(
    ("facts", "tag"),
    [
        ('#define SENDVAE_BUILD_HAS_CUDA 1\n#define SENDVAE_BUILD_CUDA_VERSION "12.8.93"\n', "1cu128"),
        ('#define SENDVAE_BUILD_HAS_CUDA 0\n#define SENDVAE_BUILD_CUDA_VERSION ""\n', "1cpu"),
    ],
)
def test_a_wheel_is_named_by_its_cuda_version(setup_script, facts, tag):
    """The facts are as CMake makes them of csrc/host/build_facts.h.in."""
    template = (ROOT / "csrc/host/build_facts.h.in").read_text()
    assert "#cmakedefine01 SENDVAE_BUILD_HAS_CUDA\n" in template
    assert '#define SENDVAE_BUILD_CUDA_VERSION "@CMAKE_CUDA_COMPILER_VERSION@"\n' in template
    assert setup_script.build_tag(facts) == tag


def copied_tree(folder):
    """What a checkout holds, but for the compiled parts and their sources."""
    shutil.copytree(
        ROOT / "sendvae_fast", folder / "sendvae_fast", ignore=shutil.ignore_patterns("_lib", "__pycache__")
    )
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "tests"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


def setup_py(tree, *arguments):
    """Run a command of setup.py without the compiled parts: cheap."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=tree, check=True, env={**os.environ, "SENDVAE_BUILD": "0"}, capture_output=True,
    )  # fmt: skip


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_runs_on_pytorch(tmp_path):
    """pip's own build of a wheel with an empty PATH; what is installed names the reason and trains."""
    tree, site = copied_tree(tmp_path / "tree"), tmp_path / "site"
    bare = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDACXX", "SENDVAE_BUILD")}
    bare["PATH"] = str(tmp_path / "no-programs")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", site]
    subprocess.run([*pip, tree], check=True, cwd=tmp_path, env=bare, capture_output=True)
    lib = site / "sendvae_fast" / "_lib"
    assert [path.name for path in lib.iterdir()] == [library.NOT_BUILT_FILE]
    code = (
        "import torch, sendvae_fast; from sendvae_fast import ops; from sendvae_fast.cli.main import main; "
        "from sendvae_fast.train.run_words import ops_facts; "
        "print(sendvae_fast.__file__); print(ops.chosen_backend('cosine_align', 'cpu')); print(ops_facts()['ops']); "
        "x = torch.eye(4)[None]; print(ops.cosine_align(x, -x).item()); main(['doctor', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env={**bare, "PYTHONPATH": str(site)},
        capture_output=True, text=True,
    )  # fmt: skip
    file, backend, header, distance, report = done.stdout.split("\n", 4)
    assert Path(file).is_relative_to(site) and backend == "reference" and float(distance) == pytest.approx(2.0)
    reason = "not built: no C++ compiler was found (none of c++, g++"
    assert reason in header
    (line,) = [line for line in json.loads(report) if line["name"] == "compiled ops"]
    assert line["value"].startswith(reason) and line["verdict"] == "warning"


def names_of_configs():
    return {path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml")}


def test_wheel_contents(tmp_path):
    """The package with its data files and the configs in it; no tests, no sources of the compiled parts."""
    tree = copied_tree(tmp_path / "tree")
    setup_py(tree, "bdist_wheel", "--dist-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path.relative_to(tree).as_posix() for path in tree.glob("sendvae_fast/**/*") if path.is_file()}
    assert names == files | {f"sendvae_fast/{name}" for name in names_of_configs()}


def test_configs_are_found_in_an_installed_wheel(tmp_path):
    """By name, their `base` with them, from a folder that has none."""
    tree, site = copied_tree(tmp_path / "tree"), tmp_path / "site"
    setup_py(tree, "bdist_wheel", "--dist-dir", str(tmp_path))
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    code = (
        "from sendvae_fast import config as c; p = c.find_config('vae/f16d16'); print(p, c.read_config(p)['init_from'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(site / "sendvae_fast/configs/vae/f16d16.yaml"), "pretrained/vae-f16d16"]
    assert len([*site.glob("sendvae_fast/configs/**/*.yaml")]) == len(names_of_configs()) > 40


def test_the_commit_is_known_in_a_wheel_and_in_one_made_of_a_source_distribution(tmp_path):
    tree = copied_tree(tmp_path / "tree")
    git = ["git", "-C", tree, "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    setup_py(tree, "sdist", "--dist-dir", str(tmp_path))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "sources", filter="data")
    for number, place in enumerate((tree, next((tmp_path / "sources").iterdir()))):
        out = tmp_path / f"wheel{number}"
        setup_py(place, "bdist_wheel", "--dist-dir", str(out))
        zipfile.ZipFile(next(out.glob("*.whl"))).extractall(out / "site")
        code = "from sendvae_fast.version import package_commit; print(package_commit())"
        environment = {**os.environ, "PYTHONPATH": str(out / "site")}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == head


def test_source_distribution_contents(tmp_path):
    """What a build needs beside the package: the configs, the sources of the compiled parts."""
    tree = copied_tree(tmp_path / "tree")
    (tree / "csrc" / "library.cpp").touch()
    setup_py(tree, "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "csrc/library.cpp"} | names_of_configs() <= names
