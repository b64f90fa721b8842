// Spatial attention on a GPU: which kernels run, on which grid. The reference is
// reference.spatial_attention.
#include "host.h"
#include "spatial_generic.cuh"
#include "spatial_mma.cuh"

#include <algorithm>

namespace epa::cuda {
namespace {

constexpr int MOST_ROWS = 16; // tokens of a tile

template <class T> struct Launcher {
  using A = Accumulate<T>;
  const SpatialAttention &a;

  Spatial<T> arguments(Chunks chunks) const {
    return {a.N,
            a.H,
            chunks.size,
            static_cast<int>(a.D),
            static_cast<int>(a.P),
            a.normalize,
            a.threshold,
            a.seed,
            heads<const T>(a.q),
            heads<const T>(a.k_proj),
            heads<const T>(a.v_proj),
            static_cast<const A *>(a.temperature),
            a.temperature_stride,
            static_cast<A *>(a.q_norm)};
  }

  bool is_specialised() const {
    return has_tensor_cores<T>(a.tf32x3) && has_mma<T>(a.D) && a.P <= MAP_COLUMNS;
  }

  dim3 grid(Chunks chunks) const { return dim3(chunks.count, a.H, a.B); }

  void check(const char *kernel) const {
    check_launch("spatial_attention", kernel, "B N H D P", {a.B, a.N, a.H, a.D, a.P});
  }

  void forward(View out) const {
    const Chunks sums = sum_chunks(a.N), chunks = output_chunks(a.N);
    A *squares = static_cast<A *>(a.workspace);
    if (a.normalize) {
      EPA_LAUNCH((spatial_attention_square_sums_fwd_kernel<T>), grid(sums), MERGE_THREADS, 0,
                 a.stream, arguments(sums), squares);
      check("square_sums_fwd");
    }
    if (is_specialised())
      return with_head_dim<T>(
          a.D, [&](auto d) { forward_mma<decltype(d)::value>(chunks, squares, sums.count, out); });
    const int64_t shared = (a.D + GENERIC_WARPS * a.P) * sizeof(A);
    EPA_LAUNCH((spatial_attention_output_fwd_kernel<T>), grid(chunks), GENERIC_THREADS, shared,
               a.stream, arguments(chunks), squares, static_cast<int>(sums.count), heads<T>(out));
    check("output_fwd");
  }

  template <int D> void forward_mma(Chunks chunks, const A *squares, int count, View out) const {
    EPA_LAUNCH((spatial_attention_output_fwd_mma_kernel<T, D>), grid(chunks), MMA_THREADS, 0,
               a.stream, arguments(chunks), squares, count, heads<T>(out));
    check("output_fwd_mma");
  }

  void backward(View dout, const SpatialAttentionGradients &gradients) const {
    const Chunks chunks = sum_chunks(a.N), outputs = output_chunks(a.N);
    const int count = chunks.count;
    A *sums = static_cast<A *>(a.workspace), *dnorm = sums + a.B * a.H * count * 2 * a.P * a.D;
    if (is_specialised()) {
      with_head_dim<T>(
          a.D, [&](auto d) { sums_mma<decltype(d)::value>(chunks, dout, gradients.q, sums); });
    } else {
      const int64_t scale = a.D * sizeof(A), row = 2 * a.P * sizeof(A);
      const int rows = std::min<int64_t>(MOST_ROWS, (SHARED_LIMIT - scale) / row);
      EPA_LAUNCH((spatial_attention_output_bwd_kernel<T>), grid(chunks), GENERIC_THREADS,
                 scale + rows * row, a.stream, arguments(chunks), heads<const T>(dout),
                 heads<T>(gradients.q), sums, rows);
      check("output_bwd");
    }
    EPA_LAUNCH((spatial_attention_merge_bwd_kernel<T>), dim3(1, a.H, a.B), MERGE_THREADS, 0,
               a.stream, arguments(chunks), sums, count, heads<T>(gradients.k_proj),
               heads<T>(gradients.v_proj), static_cast<A *>(gradients.temperature), dnorm);
    check("merge_bwd");
    if (!a.normalize) return;
    EPA_LAUNCH((spatial_attention_norm_bwd_kernel<T>), grid(outputs), MERGE_THREADS, 0, a.stream,
               arguments(outputs), dnorm, heads<T>(gradients.q));
    check("norm_bwd");
  }

  template <int D> void sums_mma(Chunks chunks, View dout, View dq, A *sums) const {
    EPA_LAUNCH((spatial_attention_output_bwd_mma_kernel<T, D>), grid(chunks), MMA_THREADS, 0,
               a.stream, arguments(chunks), heads<const T>(dout), heads<T>(dq), sums);
    check("output_bwd_mma");
  }
};

} // namespace

int64_t spatial_attention_fwd_workspace(const SpatialAttention &a) {
  if (!a.normalize) return 0;
  return a.B * a.H * sum_chunks(a.N).count * a.D * accumulate_size(a.q.dtype);
}

int64_t spatial_attention_bwd_workspace(const SpatialAttention &a) {
  const int64_t sums = sum_chunks(a.N).count * 2 * a.P * a.D;
  return a.B * a.H * (sums + a.D) * accumulate_size(a.q.dtype);
}

void spatial_attention_fwd(const SpatialAttention &a, View out) {
  with_type(a.q.dtype, [&](auto type) { Launcher<typename decltype(type)::type>{a}.forward(out); });
}

void spatial_attention_bwd(const SpatialAttention &a, View dout,
                           const SpatialAttentionGradients &gradients) {
  with_type(a.q.dtype, [&](auto type) {
    Launcher<typename decltype(type)::type>{a}.backward(dout, gradients);
  });
}

} // namespace epa::cuda
