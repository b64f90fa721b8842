// The C API of the CUDA kernels: as kernels.h, but for what a GPU changes.
//
//   memory    on the device, results too; so is the seed, which no kernel's launch waits for
//   workspace of as many bytes as the op's function says for the same arguments
//   launches  on `stream`, in order; nothing is allocated and nothing waits, so graphs capture them
//   repeats   have the same bits: no order of blocks or of atomics decides a sum
//   errors    std::runtime_error for a launch that fails
#pragma once
#include <cstdint>

#include "../kernels.h"

namespace epa::cuda {

struct PairedAttention {
  int64_t B, N, C, H, P; // B up to 65533, C up to 1024, C / H and P up to 512
  Kind kind;
  Layout layout;
  bool direct;                                   // plan for few tokens: no summary; nothing is kept
  uint32_t channel_threshold, spatial_threshold; // dropout, 0 for none; see philox.h
  const int64_t *seed;                           // null without dropout
  Dtype weight_dtype;                // W, of all parameters: that of x, or that of sums, T
  bool tf32x3;                       // float32 multiplies on tensor cores, in three TF32 products
  View x;                            // (B, N, C)
  View proj_k_weight, proj_v_weight; // (P, N); the second is null unless kind is split
  const void *qkvv_weight;           // W (4C, C)
  const void *qkvv_bias;             // W (4C) or null
  const void *proj_k_bias;           // W (P) or null
  const void *proj_v_bias;           // W (P) or null
  const void *temperature;           // W (H)
  const void *temperature2;          // W (H)
  const void *out_proj_weight;       // W (C/2, C), null for kind sum
  const void *out_proj_bias;         // W (C/2) or null
  const void *out_proj2_weight;      // W (C/2, C), null for kind sum
  const void *out_proj2_bias;        // W (C/2) or null
  double *mean;                      // (B, C)        kept for backward, unless direct
  void *gram;                        // T (B, C, C)
  void *projected;                   // T (B, J, P, C), J = 2 for kind split, else 1
  void *workspace;                   // aligned to 16 bytes
  void *stream;
};

struct SpatialAttention {
  int64_t B, N, H, D, P; // B, H up to 65535, D up to 1024, P up to 512
  bool normalize;
  bool tf32x3;                // float32 multiplies on tensor cores, in three TF32 products
  uint32_t threshold;         // dropout, 0 for none; see philox.h
  const int64_t *seed;        // null without dropout
  View q;                     // (B, N, H, D)
  View k_proj, v_proj;        // (B, P, H, D)
  const void *temperature;    // T (H)
  int64_t temperature_stride; // 0 for one temperature
  void *q_norm;               // T (B, H, D)    kept; ones unless normalize
  void *workspace;            // aligned to 16 bytes
  void *stream;
};

struct SpatialAttentionGradients {
  View q, k_proj, v_proj;
  void *temperature; // T (B, H), for the caller to add over B
};

struct ChannelAttention {
  int64_t B, N, H, D; // B, H up to 65535, D up to 256
  bool tf32x3;        // float32 multiplies on tensor cores, in three TF32 products
  uint32_t threshold;
  const int64_t *seed;
  View q, k, v; // (B, N, H, D)
  const void *temperature;
  int64_t temperature_stride;
  void *gram;            // T (B, H, D, D)  kept: <q_i, k_j>
  void *q_norm, *k_norm; // T (B, H, D)     kept
  void *workspace;
  void *stream;
};

struct ChannelAttentionGradients {
  View q, k, v;
  void *temperature; // T (B, H), for the caller to add over B
};

int64_t paired_attention_fwd_workspace(const PairedAttention &);
int64_t paired_attention_bwd_workspace(const PairedAttention &);
// y and dy (B, N, C) are dense. Gradients as kernels.h says, but of W where parameters are.
void paired_attention_fwd(const PairedAttention &, void *y);
void paired_attention_bwd(const PairedAttention &, const void *dy,
                          const PairedAttentionGradients &);

int64_t spatial_attention_fwd_workspace(const SpatialAttention &);
int64_t spatial_attention_bwd_workspace(const SpatialAttention &);
void spatial_attention_fwd(const SpatialAttention &, View out);
void spatial_attention_bwd(const SpatialAttention &, View dout, const SpatialAttentionGradients &);

int64_t channel_attention_fwd_workspace(const ChannelAttention &);
int64_t channel_attention_bwd_workspace(const ChannelAttention &);
void channel_attention_fwd(const ChannelAttention &, View out);
void channel_attention_bwd(const ChannelAttention &, View dout, const ChannelAttentionGradients &);

} // namespace epa::cuda
