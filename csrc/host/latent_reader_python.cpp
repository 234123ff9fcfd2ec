#include "latent_reader_python.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "latent_reader.h"

namespace py = pybind11;

namespace sendvae {
namespace {

using ShardTuple = std::tuple<std::string, int64_t, int64_t, std::vector<int64_t>>;

// A submitted batch with the Python buffers that are being filled, which it keeps alive and locked.
struct Ticket {
  std::shared_ptr<LatentReader> reader;
  std::shared_ptr<LatentReader::Batch> batch;
  std::vector<py::buffer_info> views;

  // Nobody may free the buffers while threads still write to them.
  ~Ticket() {
    const py::gil_scoped_release release;
    try {
      reader->wait(batch);
    } catch (const ReadError&) {  // reported by wait, if anybody asked
    }
  }

  void wait() const {
    const py::gil_scoped_release release;
    reader->wait(batch);
  }
};

std::shared_ptr<LatentReader> make_reader(const std::vector<ShardTuple>& shards, std::vector<int64_t> row_bytes,
                                          int num_threads) {
  if (row_bytes.empty() || *std::min_element(row_bytes.begin(), row_bytes.end()) < 1) {
    throw py::value_error("LatentReader: row_bytes must name at least one field, of at least 1 byte");
  }
  std::vector<LatentShard> list;
  for (const auto& [path, bytes, count, offsets] : shards) list.push_back({path, bytes, count, offsets});
  return std::make_shared<LatentReader>(std::move(list), std::move(row_bytes), num_threads);
}

int64_t contiguous_bytes(const py::buffer_info& view) {
  int64_t packed = view.itemsize;
  for (py::ssize_t i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] != 1 && view.strides[i] != packed) {
      throw py::value_error("LatentReader.submit: buffers must be contiguous");
    }
    packed *= view.shape[i];
  }
  return packed;
}

std::unique_ptr<Ticket> submit(const std::shared_ptr<LatentReader>& reader, std::vector<int64_t> ids,
                               std::vector<int64_t> variants, const std::vector<py::buffer>& buffers) {
  if (variants.size() != ids.size()) throw py::value_error("LatentReader.submit: one variant per id is needed");
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= reader->num_samples()) {
      throw py::index_error("LatentReader.submit: id " + std::to_string(ids[i]) + " is not in [0, " +
                            std::to_string(reader->num_samples()) + ")");
    }
    if (variants[i] < 0 || variants[i] >= reader->num_variants()) {
      throw py::index_error("LatentReader.submit: variant " + std::to_string(variants[i]) + " is not in [0, " +
                            std::to_string(reader->num_variants()) + ")");
    }
  }
  if (static_cast<int64_t>(buffers.size()) != reader->num_fields()) {
    throw py::value_error("LatentReader.submit: takes " + std::to_string(reader->num_fields()) + " buffers, got " +
                          std::to_string(buffers.size()));
  }
  std::vector<py::buffer_info> views;
  std::vector<char*> targets;
  for (int64_t field = 0; field < reader->num_fields(); ++field) {
    views.push_back(buffers[field].request(/*writable=*/true));
    const int64_t got = contiguous_bytes(views.back());
    const int64_t wanted = static_cast<int64_t>(ids.size()) * reader->row_bytes(field);
    if (got != wanted) {
      throw py::value_error("LatentReader.submit: buffer " + std::to_string(field) + " holds " + std::to_string(got) +
                            " bytes, but the rows take " + std::to_string(wanted));
    }
    targets.push_back(static_cast<char*>(views.back().ptr));
  }
  auto batch = reader->submit(std::move(ids), std::move(variants), std::move(targets));
  return std::unique_ptr<Ticket>(new Ticket{reader, std::move(batch), std::move(views)});
}

}  // namespace

void define_latent_reader(py::module_& module) {
  py::register_exception<ReadError>(module, "ReadError", PyExc_OSError);
  py::class_<Ticket>(module, "LatentTicket", "A batch that is being read.")
      .def("wait", &Ticket::wait,
           "Returns when the buffers are filled, with the GIL released meanwhile. Raises ReadError, naming the file.");
  py::class_<LatentReader, std::shared_ptr<LatentReader>>(
      module, "LatentReader",
      "Threads that fill caller-owned buffers with rows of latent shards, in the order of submission.\n\n"
      "shards: (path, bytes of the file, number of samples, byte offset of every field of every variant) each, in the\n"
      "order of their samples' ids. row_bytes: bytes of a sample in each field.")
      .def(py::init(&make_reader), py::arg("shards"), py::arg("row_bytes"), py::arg("num_threads") = 4)
      .def("submit", &submit, py::arg("ids"), py::arg("variants"), py::arg("buffers"),
           "Start reading one sample per id, in its variant, into one writable contiguous buffer per field.")
      .def_property_readonly("num_samples", &LatentReader::num_samples);
}

}  // namespace sendvae
