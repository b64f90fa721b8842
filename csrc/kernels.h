// The C API of the kernels: plain structs and functions, no torch, no Python. cuda/cuda_kernels.h
// has what a GPU changes.
//
//   axes      B batch, N tokens, C channels, H heads, D = C/H head dim, P projected tokens
//   dtypes    activations and token projections in their own dtype; everything else, "T" below, in
//             the accumulation dtype of x: double for float64, float for the rest
//   strides   any for a View, except the gradient of y, which is contiguous; T is contiguous
//   memory    the caller owns all of it; results are written entirely
//   errors    std::bad_alloc; the caller has checked shapes, dtypes and addresses
//
// The reference of each op is epa_kernels/reference.py. The two-pass form, whose names the kernels
// take, is epa_kernels/backends/two_pass.py.
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

// The tensors of each op, in the order in which they are handed over. A VIEW has its own dtype and
// strides; a WEIGHT is contiguous and of T, on CUDA of W, see cuda_kernels.h.
// clang-format off
#define EPA_PAIRED_ATTENTION(VIEW, WEIGHT)                                                         \
  VIEW(x)                  /* (B, N, C) */                                                         \
  VIEW(proj_k_weight)      /* (P, N) */                                                            \
  VIEW(proj_v_weight)      /* (P, N), null unless kind is split */                                 \
  WEIGHT(qkvv_weight)      /* (4C, C) */                                                           \
  WEIGHT(qkvv_bias)        /* (4C) or null */                                                      \
  WEIGHT(proj_k_bias)      /* (P) or null */                                                       \
  WEIGHT(proj_v_bias)      /* (P) or null */                                                       \
  WEIGHT(temperature)      /* (H) */                                                               \
  WEIGHT(temperature2)     /* (H) */                                                               \
  WEIGHT(out_proj_weight)  /* (C/2, C), null for kind sum */                                       \
  WEIGHT(out_proj_bias)    /* (C/2) or null */                                                     \
  WEIGHT(out_proj2_weight) /* (C/2, C), null for kind sum */                                       \
  WEIGHT(out_proj2_bias)   /* (C/2) or null */
#define EPA_SPATIAL_ATTENTION(VIEW, WEIGHT)                                                        \
  VIEW(q)                  /* (B, N, H, D) */                                                      \
  VIEW(k_proj)             /* (B, P, H, D) */                                                      \
  VIEW(v_proj)             /* (B, P, H, D) */                                                      \
  WEIGHT(temperature)      /* (H) */
#define EPA_CHANNEL_ATTENTION(VIEW, WEIGHT)                                                        \
  VIEW(q)                  /* (B, N, H, D) */                                                      \
  VIEW(k)                  /* (B, N, H, D) */                                                      \
  VIEW(v)                  /* (B, N, H, D) */                                                      \
  WEIGHT(temperature)      /* (H) */
// clang-format on

// `<Op>Tensors<Pointer>`: those of an op as members. `each` calls f(name, member) in their order.
#define EPA_DECLARE_VIEW(name) View name;
#define EPA_DECLARE_WEIGHT(name) Pointer name;
#define EPA_VISIT(name) f(#name, name);
#define EPA_COUNT(name) +1
#define EPA_IGNORE(name)
#define EPA_TENSORS(Op, LIST)                                                                      \
  template <class Pointer> struct Op##Tensors {                                                    \
    static constexpr int VIEWS = 0 LIST(EPA_COUNT, EPA_IGNORE);                                    \
    static constexpr int WEIGHTS = 0 LIST(EPA_IGNORE, EPA_COUNT);                                  \
    LIST(EPA_DECLARE_VIEW, EPA_DECLARE_WEIGHT)                                                     \
    template <class F> void each(F f) { LIST(EPA_VISIT, EPA_VISIT) }                               \
  };
EPA_TENSORS(PairedAttention, EPA_PAIRED_ATTENTION)
EPA_TENSORS(SpatialAttention, EPA_SPATIAL_ATTENTION)
EPA_TENSORS(ChannelAttention, EPA_CHANNEL_ATTENTION)
#undef EPA_TENSORS
#undef EPA_IGNORE
#undef EPA_COUNT
#undef EPA_VISIT
#undef EPA_DECLARE_WEIGHT
#undef EPA_DECLARE_VIEW

// Where each gradient goes: a view in the dtype and strides of its input, the others as weights.
using PairedAttentionGradients = PairedAttentionTensors<void *>;
using SpatialAttentionGradients = SpatialAttentionTensors<void *>;
using ChannelAttentionGradients = ChannelAttentionTensors<void *>;

// What a call takes on every device. Thresholds are those of dropout, 0 for none; see philox.h.
struct PairedAttentionInputs : PairedAttentionTensors<const void *> {
  int64_t B, N, C, H, P;
  Kind kind;
  Layout layout;
  bool direct; // plan for few tokens: no summary; nothing is kept
  uint32_t channel_threshold, spatial_threshold;
  double *mean;    // (B, C)        kept for backward, unless direct
  void *gram;      // T (B, C, C)
  void *projected; // T (B, J, P, C), J = 2 for kind split, else 1
};

struct SpatialAttentionInputs : SpatialAttentionTensors<const void *> {
  int64_t B, N, H, D, P;
  bool normalize;
  uint32_t threshold;
  void *q_norm; // T (B, H, D)    kept; ones unless normalize
};

struct ChannelAttentionInputs : ChannelAttentionTensors<const void *> {
  int64_t B, N, H, D;
  uint32_t threshold;
  void *gram;            // T (B, H, D, D)  kept: <q_i, k_j>
  void *q_norm, *k_norm; // T (B, H, D)     kept
};

// A call on a CPU.
struct PairedAttention : PairedAttentionInputs {
  uint64_t seed;
  int threads;
};
struct SpatialAttention : SpatialAttentionInputs {
  uint64_t seed;
  int threads;
};
struct ChannelAttention : ChannelAttentionInputs {
  uint64_t seed;
  int threads;
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
