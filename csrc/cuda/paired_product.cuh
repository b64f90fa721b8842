// The output projection, for every dtype and shape.
//
//   product_fwd   y_s = out_s' Wo1^T + bias, where out_s' went through memory
//   project_back  dout = dy_s Wo1, a job of the mix
#pragma once
#include "paired.cuh"

namespace epa::cuda {

// y_s = out_s' Wo1^T + bias, where out_s' went through memory.
template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_product_fwd_kernel(Paired<T> a, const T *out_s, T *y) {
  using A = Accumulate<T>;
  const int64_t start = int64_t(blockIdx.x) * TOKEN_ROWS, first = blockIdx.y * a.N + start;
  const int rows = a.N - start < TOKEN_ROWS ? int(a.N - start) : TOKEN_ROWS, C = a.C;
  Products<A> sum(rows, a.O);
  while (sum.next()) {
    sum.add(
        C, [&](int i, int k) { return widen(out_s[(first + i) * C + k]); },
        [&](int k, int o) { return a.out_proj_weight[o * C + k]; });
    sum.each([&](int i, int o, A value) {
      if (a.out_proj_bias) value += a.out_proj_bias[o];
      y[(first + i) * C + o] = narrow<T>(value);
    });
  }
}

// dout = dy_s Wo1, of TOKEN_ROWS tokens from `start` on.
template <class T>
__device__ void project_back(const Paired<T> &a, int64_t b, int64_t start, const T *dy, T *dout) {
  using A = Accumulate<T>;
  const int rows = a.N - start < TOKEN_ROWS ? int(a.N - start) : TOKEN_ROWS;
  Products<A> sum(rows, a.C);
  while (sum.next()) {
    sum.add(
        a.O, [&](int i, int k) { return widen(dy[(b * a.N + start + i) * a.C + k]); },
        [&](int k, int c) { return a.out_proj_weight[k * a.C + c]; });
    sum.each(
        [&](int i, int c, A value) { dout[(b * a.N + start + i) * a.C + c] = narrow<T>(value); });
  }
}

} // namespace epa::cuda
