// Channel attention on a GPU: which kernels run, on which grid. The reference is
// reference.channel_attention.
#include "channel_generic.cuh"
#include "channel_mma.cuh"
#include "host.h"

#include <algorithm>

namespace epa::cuda {
namespace {

constexpr int64_t MOST_ROWS = 64;                      // tokens of a tile
constexpr int64_t STATIC_SHARED = CHANNEL_THREADS * 8; // bytes

template <class T> struct Launcher {
  using A = Accumulate<T>;
  const ChannelAttention &a;
  Chunks sums = sum_chunks(a.N), outputs = output_chunks(a.N);

  Channel<T> arguments() const {
    return {a.H,
            static_cast<int>(a.D),
            static_cast<int>(sums.count),
            a.threshold,
            a.seed,
            static_cast<const A *>(a.temperature),
            a.temperature_stride,
            static_cast<A *>(a.gram),
            static_cast<A *>(a.q_norm),
            static_cast<A *>(a.k_norm)};
  }

  void check(const char *kernel) const {
    check_launch("channel_attention", kernel, "B N H D", {a.B, a.N, a.H, a.D});
  }

  bool is_specialised() const { return has_tensor_cores<T>(a.tf32x3) && has_mma<T>(a.D); }

  void gram(View left, View right, bool has_norms, A *to) const {
    const dim3 grid(sums.count, a.H, a.B);
    if (is_specialised()) {
      with_head_dim<T>(a.D, [&](auto d) {
        EPA_LAUNCH((channel_attention_gram_mma_kernel<T, decltype(d)::value>), grid, MMA_THREADS, 0,
                   a.stream, a.N, a.H, sums.size, heads<const T>(left), heads<const T>(right),
                   has_norms, to);
      });
      return check("gram_mma");
    }
    const int64_t row = 2 * a.D * sizeof(A);
    const int rows = std::min(MOST_ROWS, (SHARED_LIMIT - STATIC_SHARED) / row);
    EPA_LAUNCH((channel_attention_gram_kernel<T>), grid, CHANNEL_THREADS, rows * row, a.stream, a.N,
               a.H, static_cast<int>(a.D), sums.size, heads<const T>(left), heads<const T>(right),
               has_norms, to, rows);
    check("gram");
  }

  void product(const ChannelProducts<T> &products) const {
    const dim3 grid(outputs.count * products.count, a.H, a.B);
    if (is_specialised()) {
      with_head_dim<T>(a.D, [&](auto d) {
        EPA_LAUNCH((channel_attention_product_mma_kernel<T, decltype(d)::value>), grid, MMA_THREADS,
                   0, a.stream, a.N, a.H, outputs.size, products);
      });
      return check("product_mma");
    }
    EPA_LAUNCH((channel_attention_product_kernel<T>), grid, CHANNEL_THREADS, 0, a.stream, a.N, a.H,
               static_cast<int>(a.D), outputs.size, products);
    check("product");
  }

  void forward(View out) const {
    A *transposed = static_cast<A *>(a.workspace);
    A *parts = transposed + a.B * a.H * a.D * a.D;
    gram(a.q, a.k, true, parts);
    EPA_LAUNCH((channel_attention_mix_fwd_kernel<T>), dim3(1, a.H, a.B), CHANNEL_THREADS,
               CHANNEL_WARPS * a.D * sizeof(A), a.stream, arguments(), parts, transposed);
    check("mix_fwd");
    product({1, {{heads<const T>(a.v), transposed, {}, nullptr, heads<T>(out), nullptr}}});
  }

  void backward(View dout, const ChannelAttentionGradients &gradients) const {
    const int64_t heads_count = a.B * a.H, matrix = heads_count * a.D * a.D;
    A *attention = static_cast<A *>(a.workspace), *ddots = attention + matrix;
    A *ddots_transposed = ddots + matrix, *dq_norm = ddots_transposed + matrix;
    A *dk_norm = dq_norm + heads_count * a.D, *parts = dk_norm + heads_count * a.D;
    gram(dout, a.v, false, parts);
    EPA_LAUNCH((channel_attention_mix_bwd_kernel<T>), dim3(1, a.H, a.B), CHANNEL_THREADS,
               2 * CHANNEL_WARPS * a.D * sizeof(A), a.stream, arguments(), parts, attention, ddots,
               ddots_transposed, dq_norm, dk_norm, static_cast<A *>(gradients.temperature));
    check("mix_bwd");
    const auto q = heads<const T>(a.q), k = heads<const T>(a.k);
    product({3,
             {{k, ddots_transposed, q, dq_norm, heads<T>(gradients.q), arguments().k_norm},
              {q, ddots, k, dk_norm, heads<T>(gradients.k), arguments().q_norm},
              {heads<const T>(dout), attention, {}, nullptr, heads<T>(gradients.v), nullptr}}});
  }
};

} // namespace

int64_t channel_attention_fwd_workspace(const ChannelAttention &a) {
  const int64_t parts = sum_chunks(a.N).count * (a.D + 2) * a.D;
  return a.B * a.H * (a.D * a.D + parts) * accumulate_size(a.q.dtype);
}

int64_t channel_attention_bwd_workspace(const ChannelAttention &a) {
  const int64_t parts = sum_chunks(a.N).count * a.D * a.D;
  return a.B * a.H * (3 * a.D * a.D + 2 * a.D + parts) * accumulate_size(a.q.dtype);
}

void channel_attention_fwd(const ChannelAttention &a, View out) {
  with_type(a.q.dtype, [&](auto type) { Launcher<typename decltype(type)::type>{a}.forward(out); });
}

void channel_attention_bwd(const ChannelAttention &a, View dout,
                           const ChannelAttentionGradients &gradients) {
  with_type(a.q.dtype, [&](auto type) {
    Launcher<typename decltype(type)::type>{a}.backward(dout, gradients);
  });
}

} // namespace epa::cuda
