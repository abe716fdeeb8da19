// The operators on CUDA: the device, the stream and the memory of a call, for the kernels to use.
//
// Nothing waits for the device and nothing is read from it, so every call may be captured in a
// graph. The library has a CUDA runtime of its own, linked statically, and takes from torch only
// what the stable ABI offers; it loads where torch has no CUDA as well.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <mutex>

#include "../divergence_operators.h"
#include "../operators.h"
#include "../pointwise_operators.h"
#include "../shard_operators.h"
#include "../statistics_operators.h"
#include "device/architecture.h"
#include "kernels.h"

// Weak, because a torch without CUDA has none.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fused_ce::cuda {

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

// Of the current device.
Device describe(int index) {
  const auto attribute = [index](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, index));
    return value;
  };
  Device device;
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  // Others either have no clusters or none of more than one block.
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  device.has_clusters = (major == 9 || major == 10) && code_for_current_device() >= 90;
  return device;
}

// The current device, which is asked once.
const Device& device_at(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard lock(mutex);
  const auto at = known.find(index);
  return at != known.end() ? at->second : known.emplace(index, describe(index)).first->second;
}

// Makes a device current to torch's runtime and to this library's own. Torch puts back what was
// current before: it knows whether the thread had used a device at all, where a cudaSetDevice() of
// the default one would initialise it.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) : guard_(index) { check(cudaSetDevice(index)); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

class Cuda {
 public:
  explicit Cuda(const Tensor& input) : input_(input), current_(input.get_device_index()) {
    const int index = input.get_device_index();
    FCE_CHECK(aoti_torch_get_current_cuda_stream,
              "this torch has CUDA tensors but names no CUDA stream; install another build of it");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<Stream>(stream);
    device_ = &device_at(index);
  }

  void forward(Problem& p) {
    cuda::forward(p, *device_, workspace_for(p).data_ptr(), stream_);
    check(cudaGetLastError());
  }

  void backward(Problem& p) { backward(p, When::kAlways); }
  void rescale(Problem& p) { backward(p, When::kUnlessGradOutputIsOne); }

  void backward_target(Problem& p) {
    cuda::backward_target(p, *device_, stream_);
    check(cudaGetLastError());
  }

  void backward_logit_scale(Problem& p) {
    cuda::backward_logit_scale(p, *device_, workspace_for(p).data_ptr(), stream_);
    check(cudaGetLastError());
  }

  void find_statistics(Problem& p, const Statistics& s) {
    cuda::find_statistics(p, s, *device_, stream_);
    check(cudaGetLastError());
  }

  void find_statistics_gradient(Problem& p, const Statistics& s) {
    cuda::find_statistics_gradient(p, s, *device_, stream_);
    check(cudaGetLastError());
  }

  void evaluate_pointwise(const Problem& p, const Pointwise& s) {
    evaluate_pointwise(p, s, When::kAlways);
  }
  void rescale_pointwise(const Problem& p, const Pointwise& s) {
    evaluate_pointwise(p, s, When::kUnlessGradOutputIsOne);
  }

  void find_divergence(Problem& p, const Divergence& d) {
    const Tensor workspace = memory_of(divergence_workspace_bytes(p, *device_));
    cuda::find_divergence(p, d, *device_, workspace.data_ptr(), stream_);
    check(cudaGetLastError());
  }

  void find_divergence_gradient(Problem& p, const Divergence& d) {
    find_divergence_gradient(p, d, When::kAlways);
  }
  void rescale_divergence_gradient(Problem& p, const Divergence& d) {
    find_divergence_gradient(p, d, When::kUnlessGradOutputIsOne);
  }

  void pack_shard(const Problem& p, const Shards& s) {
    const Tensor workspace = memory_of(pack_workspace_bytes(p));
    cuda::pack_shard(p, s, *device_, workspace.data_ptr(), stream_);
    check(cudaGetLastError());
  }

  void merge_shards(const Problem& p, const Shards& s) {
    const Tensor workspace = memory_of(merge_workspace_bytes(p, *device_));
    cuda::merge_shards(p, s, *device_, workspace.data_ptr(), stream_);
    check(cudaGetLastError());
  }

  void find_shard_gradient(const Problem& p, const Shards& s) {
    cuda::find_shard_gradient(p, s, *device_, stream_);
    check(cudaGetLastError());
  }

  void find_shard_target_gradient(const Problem& p, const Shards& s) {
    cuda::find_shard_target_gradient(p, s, *device_, stream_);
    check(cudaGetLastError());
  }

  void scale(const Elements& elements, const Operand& factor) {
    cuda::scale(elements, factor, *device_, stream_);
    check(cudaGetLastError());
  }

  static bool is_known_to_be_one(const Operand&) { return false; }
  static void prepare(const Tensor&) {}

 private:
  Tensor workspace_for(const Problem& p) const { return memory_of(workspace_bytes(p, *device_)); }

  // Whoever takes it next does so on the same stream.
  Tensor memory_of(size_t size) const {
    const auto bytes = static_cast<int64_t>(size);
    return empty(Sizes(&bytes, 1), ScalarType::Byte, input_);
  }

  void evaluate_pointwise(const Problem& p, const Pointwise& s, When when) {
    const bool sums = p.loss.data && p.reduces();
    const Tensor memory = memory_of(sums ? pointwise_workspace_bytes(p, *device_) : 0);
    cuda::evaluate_pointwise(p, s, *device_, when, memory.data_ptr(), stream_);
    check(cudaGetLastError());
  }

  void backward(Problem& p, When when) {
    cuda::backward(p, *device_, when, stream_);
    check(cudaGetLastError());
  }

  void find_divergence_gradient(Problem& p, const Divergence& d, When when) {
    cuda::find_divergence_gradient(p, d, *device_, when, stream_);
    check(cudaGetLastError());
  }

  const Tensor& input_;
  CurrentDevice current_;
  Stream stream_;
  const Device* device_;
};

// False as well for a torch without CUDA, and where there is no such device.
bool has_code_for(int64_t index) {
  int count = 0;
  if (!aoti_torch_get_current_cuda_stream || cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  if (index >= count) return false;
  const CurrentDevice current(static_cast<int>(index));
  return code_for_current_device() > 0;
}

}  // namespace

}  // namespace fused_ce::cuda

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CUDA, m) {
  fused_ce::register_operators<fused_ce::cuda::Cuda>(m);
  fused_ce::register_statistics<fused_ce::cuda::Cuda>(m);
  fused_ce::register_pointwise<fused_ce::cuda::Cuda>(m);
  fused_ce::register_divergence<fused_ce::cuda::Cuda>(m);
  fused_ce::register_shards<fused_ce::cuda::Cuda>(m);
}

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CompositeExplicitAutograd, m) {
  m.impl("has_cuda_code", &fused_ce::boxed<&fused_ce::cuda::has_code_for>);
}
