// center_crop on CUDA: the host plans every picture and uploads the plans; then one launch does the first pass of all
// pictures, one the second, and so on, and one converts the crops. A thread takes a pixel.
#include "center_crop.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda.cuh"

namespace sendvae {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxPictures = 65535;  // gridDim.y

// A pass over one picture; all zero where a picture has no such pass.
struct DevicePass {
  Picture in;
  uint8_t* out;  // packed
  int64_t pixels, columns;
  const int32_t *first, *count, *weights;
  int64_t width;
  bool vertical;
};

__device__ __forceinline__ int64_t thread_pixel() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

__global__ void __launch_bounds__(kThreads) pass_kernel(const DevicePass* passes) {
  const DevicePass& pass = passes[blockIdx.y];
  const int64_t pixel = thread_pixel();
  if (pixel >= pass.pixels) return;
  const int64_t row = pixel / pass.columns, column = pixel % pass.columns;
  const int64_t i = pass.vertical ? row : column, first = pass.first[i];
  const uint8_t* in = pass.vertical ? pass.in.data + first * pass.in.stride + column * kChannels
                                    : pass.in.data + row * pass.in.stride + first * kChannels;
  resample_pixel(in, pass.vertical ? pass.in.stride : kChannels, pass.weights + i * pass.width, pass.count[i],
                 pass.out + pixel * kChannels);
}

// Crops [S, S, 3] to planes, [B, 3, S, S].
__global__ void __launch_bounds__(kThreads) planes_kernel(const Picture* crops, int64_t size, uint8_t* out) {
  const int64_t pixel = thread_pixel(), pixels = size * size;
  if (pixel >= pixels) return;
  const Picture& crop = crops[blockIdx.y];
  const uint8_t* in = crop.data + pixel / size * crop.stride + pixel % size * kChannels;
  for (int c = 0; c < kChannels; ++c) out[(static_cast<int64_t>(blockIdx.y) * kChannels + c) * pixels + pixel] = in[c];
}

// Crops to floating point, [B, S, S, 3]; `normalised`, mean and std may be null.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    floats_kernel(const Picture* crops, int64_t size, T* pixels, T* normalised, const float* mean, const float* std) {
  const int64_t pixel = thread_pixel();
  if (pixel >= size * size) return;
  const Picture& crop = crops[blockIdx.y];
  const uint8_t* in = crop.data + pixel / size * crop.stride + pixel % size * kChannels;
  const int64_t offset = (static_cast<int64_t>(blockIdx.y) * size * size + pixel) * kChannels;
  for (int c = 0; c < kChannels; ++c) {
    pixels[offset + c] = from_float<T>(model_range(in[c]));
    if (normalised) normalised[offset + c] = from_float<T>(normalise(in[c], mean[c], std[c]));
  }
}

dim3 grid_for(int64_t pixels, int64_t pictures) {
  const int64_t blocks = (pixels + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), CenterCrop::kName, ": a picture is too large for one launch");
  return dim3(static_cast<uint32_t>(blocks), static_cast<uint32_t>(pictures));
}

// The values in device memory, as bytes. They may go as soon as this returns: the copy of pageable memory is staged.
template <typename T>
Tensor upload(const std::vector<T>& values, const Tensor& like, cudaStream_t stream) {
  const size_t bytes = values.size() * sizeof(T);
  const Tensor tensor = empty_on(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  if (bytes == 0) return tensor;
  const cudaError_t error =
      cudaMemcpyAsync(mutable_data<uint8_t>(tensor), values.data(), bytes, cudaMemcpyHostToDevice, stream);
  STD_TORCH_CHECK(error == cudaSuccess, CenterCrop::kName, ": upload failed: ", cudaGetErrorString(error));
  return tensor;
}

// What the passes of all pictures read and write on the device.
struct DevicePlans {
  Tensor taps, scratch;
  std::vector<DevicePass> passes;  // [pass, picture]
  std::vector<Picture> crops;

  DevicePlans(const CenterCrop& call, cudaStream_t stream) {
    std::vector<int32_t> values;
    int64_t scratch_bytes = 0;
    size_t num_passes = 0;
    for (const CropPlan& plan : call.plans) {
      num_passes = std::max(num_passes, plan.passes.size());
      for (const Pass& pass : plan.passes) {
        for (const std::vector<int32_t>* part : {&pass.taps.first, &pass.taps.count, &pass.taps.weights}) {
          values.insert(values.end(), part->begin(), part->end());
        }
        scratch_bytes += pass.rows * pass.columns * kChannels;
      }
    }
    taps = upload(values, call.images[0], stream);
    scratch = empty_on(call.images[0], {scratch_bytes}, ScalarType::Byte);
    passes.resize(num_passes * call.plans.size());

    // In the order in which the taps were laid out.
    const int32_t* next_taps = reinterpret_cast<const int32_t*>(data<uint8_t>(taps));
    uint8_t* next_out = mutable_data<uint8_t>(scratch);
    for (size_t i = 0; i < call.plans.size(); ++i) {
      Picture picture = call.source(i);
      for (size_t p = 0; p < call.plans[i].passes.size(); ++p) {
        const Pass& pass = call.plans[i].passes[p];
        const int64_t outputs = pass.taps.first.size();
        passes[p * call.plans.size() + i] = {picture,
                                             next_out,
                                             pass.rows * pass.columns,
                                             pass.columns,
                                             next_taps,
                                             next_taps + outputs,
                                             next_taps + 2 * outputs,
                                             pass.taps.width,
                                             pass.vertical};
        next_taps += outputs * (2 + pass.taps.width);
        picture = {next_out, pass.columns * kChannels};
        next_out += pass.rows * pass.columns * kChannels;
      }
      crops.push_back(picture);
    }
  }
};

void run_passes(const std::vector<DevicePass>& passes, int64_t pictures, const Tensor& like, cudaStream_t stream) {
  const Tensor table = upload(passes, like, stream);
  const auto* device_passes = reinterpret_cast<const DevicePass*>(data<uint8_t>(table));
  for (size_t first = 0; first < passes.size(); first += pictures) {
    int64_t pixels = 0;
    for (int64_t i = 0; i < pictures; ++i) pixels = std::max(pixels, passes[first + i].pixels);
    pass_kernel<<<grid_for(pixels, pictures), kThreads, 0, stream>>>(device_passes + first);
    check_launch(CenterCrop::kName);
  }
}

void write_crops(const CenterCrop& call, const std::vector<Picture>& crops, cudaStream_t stream) {
  const Tensor table = upload(crops, call.images[0], stream);
  const auto* pictures = reinterpret_cast<const Picture*>(data<uint8_t>(table));
  const dim3 grid = grid_for(call.size * call.size, call.count());
  if (call.dtype == ScalarType::Byte) {
    planes_kernel<<<grid, kThreads, 0, stream>>>(pictures, call.size, mutable_data<uint8_t>(call.pixels));
  } else {
    dispatch_float(call.dtype, [&](auto type) {
      using T = decltype(type);
      T* normalised = call.has_normalised ? mutable_data<T>(call.normalised) : nullptr;
      const float* mean = call.has_normalised ? data<float>(call.mean) : nullptr;
      const float* std = call.has_normalised ? data<float>(call.std) : nullptr;
      floats_kernel<T>
          <<<grid, kThreads, 0, stream>>>(pictures, call.size, mutable_data<T>(call.pixels), normalised, mean, std);
    });
  }
  check_launch(CenterCrop::kName);
}

std::tuple<Tensor, Tensor> center_crop_cuda(const std::vector<Tensor>& images, int64_t size,
                                            const std::vector<bool>& flips, ScalarType dtype,
                                            const std::optional<Tensor>& mean, const std::optional<Tensor>& std) {
  STD_TORCH_CHECK(!images.empty() && static_cast<int64_t>(images.size()) <= kMaxPictures, CenterCrop::kName,
                  ": there must be 1 to ", kMaxPictures, " images, got ", images.size());
  const torch::stable::accelerator::DeviceGuard guard(images[0].get_device_index());
  const cudaStream_t stream = current_stream(images[0]);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  STD_TORCH_CHECK(error == cudaSuccess && capture == cudaStreamCaptureStatusNone, CenterCrop::kName,
                  ": cannot be captured in a CUDA graph: the plans of the pictures come from the host");
  const CenterCrop call(images, size, flips, dtype, mean, std);
  const DevicePlans plans(call, stream);
  run_passes(plans.passes, call.count(), call.images[0], stream);
  write_crops(call, plans.crops, stream);
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) {
  library.impl("center_crop", TORCH_BOX(&sendvae::center_crop_cuda));
}
