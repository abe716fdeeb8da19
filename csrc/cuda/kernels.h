// The CUDA kernels as their callers see them: plain data in, work put on a stream.
//
// Nothing here synchronises with the host, reads device memory on the host or allocates, so every
// call may be captured in a CUDA graph. Errors of a launch stay with the runtime: the caller asks
// cudaGetLastError() once it has queued all its work.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "../divergence_problem.h"
#include "../pointwise_problem.h"
#include "../problem.h"
#include "../shard_problem.h"
#include "../statistics_problem.h"

namespace fused_ce::cuda {

using Stream = cudaStream_t;

// What a call needs to know of the device it runs on.
struct Device {
  int multiprocessors = 0;
  bool has_clusters = false;  // of eight blocks, and so has the code that runs on it
};

// Device memory that forward() or backward_logit_scale() needs besides its tensors, aligned to 16
// bytes. Its contents may be undefined: the first launch of a call sets what needs setting.
size_t workspace_bytes(const Problem& p, const Device& device);

// The loss, and where `p` has memory for them the row statistics, their totals, and the gradient
// for a grad_output of 1 (p.grad may be p.input's memory). A target out of range is a device-side
// assertion, with the text of PyTorch's own.
void forward(const Problem& p, const Device& device, void* workspace, Stream stream);

enum class When { kAlways, kUnlessGradOutputIsOne };

// The gradient with respect to the logits, from the logits, the row statistics and their totals.
// With kUnlessGradOutputIsOne p.grad stays as it is where the device finds a grad_output of 1.
void backward(const Problem& p, const Device& device, When when, Stream stream);

// The gradient with respect to probability targets.
void backward_target(const Problem& p, const Device& device, Stream stream);

// The gradient with respect to the factor of all logits.
void backward_logit_scale(const Problem& p, const Device& device, void* workspace, Stream stream);

// What `s` and the row statistics of `p` have memory for; see statistics_problem.h. A target out of
// range is a device-side assertion.
void find_statistics(const Problem& p, const Statistics& s, const Device& device, Stream stream);

// p.grad from the logits, the row statistics and what arrives; it may be the logits' memory.
void find_statistics_gradient(const Problem& p, const Statistics& s, const Device& device,
                              Stream stream);

// Device memory that evaluate_pointwise() needs where it sums losses up, aligned to 16 bytes.
size_t pointwise_workspace_bytes(const Problem& p, const Device& device);

// The loss and the gradient of every element, each where `p` has memory for it; see
// pointwise_problem.h. The gradient may be written over the input.
void evaluate_pointwise(const Problem& p, const Pointwise& s, const Device& device, When when,
                        void* workspace, Stream stream);

// The loss, and where `p` and `d` have memory for them the statistics, their totals, and the
// gradient; the workspace is one of this size. See divergence_problem.h.
size_t divergence_workspace_bytes(const Problem& p, const Device& device);
void find_divergence(const Problem& p, const Divergence& d, const Device& device, void* workspace,
                     Stream stream);

// p.grad from the logits, the statistics and their totals; it may be the student's logits' memory.
void find_divergence_gradient(const Problem& p, const Divergence& d, const Device& device,
                              When when, Stream stream);

// The packet of a shard, whatever its targets are; see shard_problem.h.
size_t pack_workspace_bytes(const Problem& p);
void pack_shard(const Problem& p, const Shards& s, const Device& device, void* workspace,
                Stream stream);

// The loss, the statistics and the totals, from all packets. A target that is no class, and shards
// that do not belong together, are device-side assertions.
size_t merge_workspace_bytes(const Problem& p, const Device& device);
void merge_shards(const Problem& p, const Shards& s, const Device& device, void* workspace,
                  Stream stream);

// p.grad, which may be the logits' memory, and p.target_grad, from the logits of a shard, the
// statistics and their totals.
void find_shard_gradient(const Problem& p, const Shards& s, const Device& device, Stream stream);
void find_shard_target_gradient(const Problem& p, const Shards& s, const Device& device,
                                Stream stream);

// Multiplies every element by *factor, a device scalar, unless that is 1. A zero stays one, even
// times nan: it may be the gradient of an ignored row.
void scale(const Elements& elements, const Operand& factor, const Device& device, Stream stream);

}  // namespace fused_ce::cuda
