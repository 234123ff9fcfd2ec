// Launches as they would be made, in place of runs: the kernel, its sizes and its arguments, and the tensors that ops
// take pointers of. For predictions at sizes that would take a CPU days.
#include <chrono>
#include <cstdint>
#include <iomanip>
#include <sstream>
#include <string>
#include <vector>

#include "state.h"

namespace cuda_on_cpu {

namespace {

bool recording = false;
std::ostringstream recorded_launches, recorded_tensors;
std::string records;

std::string hex(const Argument& argument) {
  std::ostringstream out;
  out << std::hex << std::setfill('0');
  const auto* bytes = static_cast<const uint8_t*>(argument.data);
  for (size_t i = 0; i < argument.bytes; ++i) out << std::setw(2) << int{bytes[i]};
  return out.str();
}

std::ostream& next(std::ostringstream& list) { return list << (list.tellp() > 0 ? ", " : ""); }

std::string json_of(dim3 size) {
  return "[" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + "]";
}

}  // namespace

bool is_recording() { return recording; }

void record_tensor(const void* data, size_t bytes) {
  next(recorded_tensors) << "[" << reinterpret_cast<uintptr_t>(data) << ", " << bytes << "]";
}

void record_launch(size_t dynamic_shared_bytes, const std::vector<Argument>& arguments) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  next(recorded_launches) << R"({"time_ns": )" << std::chrono::duration_cast<std::chrono::nanoseconds>(now).count()
                          << R"(, "kernel": )" << running.kernel << R"(, "grid": )" << json_of(running.grid)
                          << R"(, "block": )" << json_of(running.block) << R"(, "dynamic_shared_bytes": )"
                          << dynamic_shared_bytes << R"(, "arguments": [)";
  const char* between = "";
  for (const Argument& argument : arguments) {
    recorded_launches << between << R"([")" << hex(argument) << R"(", )" << (argument.is_floating ? "true" : "false")
                      << "]";
    between = ", ";
  }
  recorded_launches << "]}";
}

}  // namespace cuda_on_cpu

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_start_recording() { cuda_on_cpu::recording = true; }

// What was recorded since the last call, as JSON.
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_records() {
  using namespace cuda_on_cpu;
  records = R"({"launches": [)" + recorded_launches.str() + R"(], "tensors": [)" + recorded_tensors.str() + "]}";
  recorded_launches.str("");
  recorded_tensors.str("");
  return records.c_str();
}
