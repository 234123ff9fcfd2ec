// sendvae_fast._lib._host: host-side helpers for Python. pybind11 only: no torch header, so it depends on no torch
// version.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../common/philox.h"
#include "build_facts.h"  // written by CMake
#include "latent_reader_python.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = SENDVAE_BUILD_COMPILER;
  info["build_type"] = SENDVAE_BUILD_TYPE;
  info["torch_version"] = SENDVAE_BUILD_TORCH_VERSION;
  info["torch_target_version"] = SENDVAE_BUILD_TORCH_TARGET_VERSION;
  info["cuda_version"] = SENDVAE_BUILD_HAS_CUDA ? py::object(py::str(SENDVAE_BUILD_CUDA_VERSION)) : py::none();
  info["cuda_architectures"] = SENDVAE_BUILD_CUDA_ARCHITECTURES;
  info["cuda_reason"] = SENDVAE_BUILD_HAS_CUDA ? py::none() : py::object(py::str(SENDVAE_BUILD_CUDA_REASON));
  return info;
}

py::tuple philox4x32(const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
  if (counter.size() != 4 || key.size() != 2) throw py::value_error("philox4x32: counter has 4 words and key has 2");
  const sendvae::PhiloxWords words =
      sendvae::philox4x32({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
  return py::make_tuple(words.x, words.y, words.z, words.w);
}

py::tuple box_muller(const py::array_t<uint32_t, py::array::c_style>& word0,
                     const py::array_t<uint32_t, py::array::c_style>& word1) {
  if (word0.ndim() != 1 || word1.ndim() != 1 || word0.size() != word1.size()) {
    throw py::value_error("box_muller: word0 and word1 must be 1-D and of one length");
  }
  py::array_t<float> first(word0.size()), second(word0.size());
  const uint32_t *w0 = word0.data(), *w1 = word1.data();
  float *f = first.mutable_data(), *s = second.mutable_data();
  for (py::ssize_t i = 0; i < word0.size(); ++i) {
    const sendvae::NormalPair pair = sendvae::normals_from_words(w0[i], w1[i]);
    f[i] = pair.first;
    s[i] = pair.second;
  }
  return py::make_tuple(first, second);
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Host-side helpers of sendvae_fast: facts of the build, the reader of latent shards, hooks for tests.";
  module.def("build_info", &build_info,
             "How the compiled parts were built: compiler, build_type, torch_version (built against),\n"
             "torch_target_version (oldest torch they load under), cuda_version and cuda_architectures, or\n"
             "None, [] and the reason in cuda_reason.");
  sendvae::define_latent_reader(module);
  module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"),
             "For tests: the four words of Philox4x32-10.");
  module.def("box_muller", &box_muller, py::arg("word0"), py::arg("word1"),
             "For tests: the two normals of each pair of words, uint32 [N] -> float32 [N], float32 [N].");
}
