// The C API of the CUDA kernels: as kernels.h, with what a GPU changes.
//
//   memory    on the device, results too; so is the seed, which no kernel's launch waits for
//   workspace of as many bytes as the op's function says for the same arguments
//   launches  on `stream`, in order; nothing is allocated and nothing waits, so graphs capture them
//   repeats   have the same bits: no order of blocks or of atomics decides a sum
//   errors    std::runtime_error for a launch that fails
//   kernels   <op>_<pass>_<fwd|bwd>_kernel, without a direction where both launch it;
//             <op>_<pass>_<fwd|bwd>_mma_kernel is the same pass on tensor cores
#pragma once
#include <cstdint>

#include "../kernels.h"

namespace epa::cuda {

// What every call has beside its inputs.
struct Launch {
  bool tf32x3;         // float32 multiplies on tensor cores, in three TF32 products
  const int64_t *seed; // null without dropout
  void *workspace;     // aligned to 16 bytes
  void *stream;
};

// B up to 65533, C up to 1024, C / H and P up to 512
struct PairedAttention : PairedAttentionInputs, Launch {
  Dtype weight_dtype; // W, of all parameters: that of x, or T
};

// B, H up to 65535, D up to 1024, P up to 512
struct SpatialAttention : SpatialAttentionInputs, Launch {
  int64_t temperature_stride; // 0 for one temperature
};

// B, H up to 65535, D up to 256
struct ChannelAttention : ChannelAttentionInputs, Launch {
  int64_t temperature_stride; // 0 for one temperature
};

int64_t paired_attention_fwd_workspace(const PairedAttention &);
int64_t paired_attention_bwd_workspace(const PairedAttention &);
// y and dy (B, N, C) are dense. Gradients as kernels.h says, of W where parameters are.
void paired_attention_fwd(const PairedAttention &, void *y);
void paired_attention_bwd(const PairedAttention &, const void *dy,
                          const PairedAttentionGradients &);

// The gradient of temperature is T (B, H), for the caller to add over B; so it is below.
int64_t spatial_attention_fwd_workspace(const SpatialAttention &);
int64_t spatial_attention_bwd_workspace(const SpatialAttention &);
void spatial_attention_fwd(const SpatialAttention &, View out);
void spatial_attention_bwd(const SpatialAttention &, View dout, const SpatialAttentionGradients &);

int64_t channel_attention_fwd_workspace(const ChannelAttention &);
int64_t channel_attention_bwd_workspace(const ChannelAttention &);
void channel_attention_fwd(const ChannelAttention &, View out);
void channel_attention_bwd(const ChannelAttention &, View dout, const ChannelAttentionGradients &);

} // namespace epa::cuda
