// The C API of the kernels: plain structs and functions, no torch, no Python.
//
//   axes      B batch, N tokens, C channels, H heads, D = C/H head dim, P projected tokens
//   dtypes    activations and token projections in their own dtype; everything else, "T" below, in the
//             accumulation dtype of x: double for float64, float for the rest
//   strides   any for a View, but that the gradient of y is contiguous; T is contiguous
//   memory    the caller owns all of it; results are written entirely
//   errors    std::bad_alloc; the caller has checked shapes, dtypes and addresses
//
// The definition of each op is epa_kernels/reference.py, the two-pass form is
// epa_kernels/two_pass.py.
#pragma once
#include <cstdint>

// Whether the compiler has float16, and under which name.
#if defined(__aarch64__)
#define EPA_FLOAT16 __fp16
#elif defined(__FLT16_MANT_DIG__)
#define EPA_FLOAT16 _Float16
#endif

namespace epa {

enum class Dtype : int { float32, float64, bfloat16, float16 };
enum class Kind : int { shared, split, sum };
enum class Layout : int { official, tokens };

// A tensor: strides in elements, one for each axis; data is null where an optional tensor is
// absent.
struct View {
  void *data;
  Dtype dtype;
  int64_t stride[4];
};

struct PairedAttention {
  int64_t B, N, C, H, P;
  Kind kind;
  Layout layout;
  bool direct; // plan for few tokens: q, k, vc, vs in memory; nothing is kept
  uint32_t channel_threshold, spatial_threshold; // dropout, 0 for none; see philox.h
  uint64_t seed;
  int threads;
  View x;                            // (B, N, C)
  View proj_k_weight, proj_v_weight; // (P, N); the second is null unless kind is split
  const void *qkvv_weight;           // T (4C, C)
  const void *qkvv_bias;             // T (4C) or null
  const void *proj_k_bias;           // T (P) or null
  const void *proj_v_bias;           // T (P) or null
  const void *temperature;           // T (H)
  const void *temperature2;          // T (H)
  const void *out_proj_weight;       // T (C/2, C), null for kind sum
  const void *out_proj_bias;         // T (C/2) or null
  const void *out_proj2_weight;      // T (C/2, C), null for kind sum
  const void *out_proj2_bias;        // T (C/2) or null
  double *mean;                      // (B, C)        kept for backward, unless direct
  void *gram;                        // T (B, C, C)
  void *projected;                   // T (B, J, P, C), J = 2 for kind split, else 1
};

// Where each gradient goes. x and the projections in their dtype and strides, the others T.
struct PairedAttentionGradients {
  View x, proj_k_weight, proj_v_weight;
  void *qkvv_weight, *qkvv_bias, *proj_k_bias, *proj_v_bias, *temperature, *temperature2,
      *out_proj_weight, *out_proj_bias, *out_proj2_weight, *out_proj2_bias;
};

struct SpatialAttention {
  int64_t B, N, H, D, P;
  bool normalize;
  uint32_t threshold;
  uint64_t seed;
  int threads;
  View q;                  // (B, N, H, D)
  View k_proj, v_proj;     // (B, P, H, D)
  const void *temperature; // T (H)
  void *q_norm;            // T (B, H, D)    kept; ones unless normalize
};

struct SpatialAttentionGradients {
  View q, k_proj, v_proj;
  void *temperature; // T (H)
};

struct ChannelAttention {
  int64_t B, N, H, D;
  uint32_t threshold;
  uint64_t seed;
  int threads;
  View q, k, v;            // (B, N, H, D)
  const void *temperature; // T (H)
  void *gram;              // T (B, H, D, D)  kept: <q_i, k_j>
  void *q_norm, *k_norm;   // T (B, H, D)     kept
};

struct ChannelAttentionGradients {
  View q, k, v;
  void *temperature; // T (H)
};

// Measured peak of one thread: multiply-adds count two.
struct Peak {
  double fma_gflops, exp2_gexps;
};

// One table for each instruction set; `kernels()` gives the one that runs.
struct Kernels {
  void (*paired_attention_fwd)(const PairedAttention &, View y);
  void (*paired_attention_bwd)(const PairedAttention &, View dy, const PairedAttentionGradients &);
  void (*spatial_attention_fwd)(const SpatialAttention &, View out);
  void (*spatial_attention_bwd)(const SpatialAttention &, View dout,
                                const SpatialAttentionGradients &);
  void (*channel_attention_fwd)(const ChannelAttention &, View out);
  void (*channel_attention_bwd)(const ChannelAttention &, View dout,
                                const ChannelAttentionGradients &);
  Peak (*peak)();
};

[[noreturn]] void out_of_memory();

// Chooses by name, or the best that this processor runs where name is empty; null if it cannot.
const Kernels *kernels(const char *isa);
// Names of the instruction sets that were built and that this processor runs, best first,
// separated by commas.
const char *isas();

} // namespace epa
