"""What the translator makes of CUDA, and what it refuses."""

import pytest

from cuda_on_cpu import build
from cuda_on_cpu.translate import UnknownConstruct, kernel_names, translate, translate_all

KERNEL = """// a kernel<<<in a comment>>>
template <typename T, int kWidth>
__global__ void __launch_bounds__(min(kWidth, 32), 2)
    kernel(const T* data) {
  __shared__ float sums[4][kWidth];
}
"""


def test_a_launch_keeps_its_arguments():
    launched = translate(
        "void f() {\n  kernel<T, true>\n      <<<blocks, dim3(4, 2), 0, stream>>>(data, n);\n}\n", "f.cu"
    )
    first, second = launched.splitlines()[1:3]
    assert first.strip() == "cuda_on_cpu::launch([&](auto... arguments) { kernel<T, true>(arguments...); }"
    assert second.strip() == ", blocks, dim3(4, 2), 0, stream)(data, n);"


def test_a_kernel_knows_its_bounds_and_lines_keep_their_numbers():
    translated = translate(KERNEL, "kernel.cu")
    assert translated.splitlines()[0] == KERNEL.splitlines()[0]
    assert "kernel(const T* data) { cuda_on_cpu::enter_kernel(min(kWidth, 32));" in translated
    assert "auto& sums = cuda_on_cpu::shared<float[4][kWidth]>(&sums_of_block);" in translated.splitlines()[4]
    assert translated.count("\n") == KERNEL.count("\n")
    assert "enter_kernel(1024)" in translate("__global__ void kernel(int n) {}", "kernel.cu")
    assert "enter_kernel" not in translate("__global__ void kernel(int n);", "kernel.cu")
    assert kernel_names(KERNEL) == {"kernel"}


def test_all_sources_are_known():
    """Needs no compiler: what the translator refuses is found on every machine."""
    for op in build.ops():
        sources = [path for path in build.cuda_sources() if f"/{op}/" in path]
        translated = translate_all(sources, lambda path: (build.ROOT / path).read_text())
        assert set(sources) < translated.keys()
        assert not any("<<<" in line.split("//")[0] for text in translated.values() for line in text.splitlines())


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("value = __shfl_down_sync(mask, value, 1);", "`__shfl_down_sync` is not known"),
        ("atomicAdd(out, 1.0f);", "`atomicAdd` is not known"),
        ("__constant__ float table[4];", "`__constant__` is not known"),
        ("cudaMallocAsync(&data, 4, stream);", "`cudaMallocAsync` is not known"),
        ("namespace cg = cooperative_groups;", "`cooperative_groups` is not known"),
        ("#include <mma.h>", "<mma.h> is not known"),
        ("extern __shared__ float buffer[];", "dynamic shared memory"),
        ("__shared__ float a[2], b[2];", "a shared variable in a form"),
        ("kernel<Rows<T>><<<1, 32>>>(data);", "a launch in a form"),
        ('asm volatile("bar.sync 0;");', "inline PTX"),
        ("const void* data = rows.tensor().const_data_ptr();", "a data pointer in a form"),
        ("auto copy = torch::stable::empty_like(x);", "`torch::stable::empty_like` may give memory"),
    ],
)
def test_what_is_unknown_is_an_error_with_file_and_line(code, says):
    with pytest.raises(UnknownConstruct, match=r"^csrc/op/op\.cu:3: ") as error:
        translate(f"// atomicAdd, <<<\n\n{code}\n", "csrc/op/op.cu")
    assert says in str(error.value)


def test_what_a_comment_or_a_string_says_is_no_construct():
    text = '// __constant__ kernel<<<1, 2>>>(x)\n/* atomicAdd\n*/ const char* name = "__ballot_sync";\n'
    assert translate(text, "f.h") == text
