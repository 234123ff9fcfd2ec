// `_host.LatentReader`: the threaded reader of latent shards, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace sendvae {

void define_latent_reader(pybind11::module_& module);

}  // namespace sendvae
