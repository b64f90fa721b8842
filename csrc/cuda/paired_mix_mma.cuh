// The kernels of the mix, with the jobs that they have on tensor cores.
//
//   fwd  grid (jobs, B): heads, then rows of k_proj and v_proj; in backward tiles of dout = dy_s
//        Wo1
//   bwd  grid (heads + jobs, B): the jobs make dq^T (x - mean) and dy_s^T out_s' of each chunk
#pragma once
#include "paired_mix.cuh"
#include "paired_product.cuh"
#include "paired_product_mma.cuh"

namespace epa::cuda {

// `width` columns of the gram at a time; dy is null forward and for kind sum; `chunk` tokens of
// dout a block, 0 where it is not made on tensor cores.
template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_mix_fwd_kernel(Paired<T> a, int width, const T *dy, T *dout, int64_t chunk) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(double, mean); // (C), then a strip (C, width); or a job of dout
  const int64_t b = blockIdx.y;
  int job = blockIdx.x;
  if (job < a.H) return mix_head(a, b, job, mean, reinterpret_cast<A *>(mean + a.C), width);
  job -= a.H;
  const int blocks = (a.P + PROJECTED_ROWS - 1) / PROJECTED_ROWS;
  if (job < a.J * blocks) return mix_projected(a, b, job / blocks, job % blocks * PROJECTED_ROWS);
  job -= a.J * blocks;
  if constexpr (sizeof(T) <= 4)
    if (chunk) {
      const int64_t sample = b * a.N * a.C;
      return project_mma<T, true>(a, job, chunk, dy + sample, dout + sample,
                                  reinterpret_cast<T *>(mean));
    }
  project_back(a, b, int64_t(job) * TOKEN_ROWS, dy, dout);
}

// dq^T (x - mean), or dWo1 = dy_s^T out_s' and dbo1, of a chunk, a block of 64 x 64.
template <class T>
__device__ void weight_sums_mma(const Paired<T> &a, const PairedBackward<T> &g, int64_t b,
                                int index, int job, T *shared) {
  const int columns = blocks_of_64(a.C), of_q = columns * columns, column = job % columns * 64;
  const int64_t start = index * g.chunk, first = b * a.N + start, at = b * g.chunks + index;
  const int64_t tokens = a.N - start < g.chunk ? a.N - start : g.chunk;
  if (job < of_q) {
    const int row = job / columns * 64;
    token_products<T, PAIRED_THREADS>(
        token_block<T>(g.dq, first, a.C, row, a.C), centred_block(a, b, start, column), tokens,
        shared, g.q_weight_sums + (at * a.C + row) * a.C + column, a.C, nullptr);
  } else {
    const int row = (job - of_q) / columns * 64;
    token_products<T, PAIRED_THREADS>(
        token_block(g.dy, first, a.C, row, a.O), token_block<T>(g.out_s, first, a.C, column, a.C),
        tokens, shared, g.out_proj_sums + (at * a.O + row) * a.C + column, a.C,
        column ? nullptr : g.out_proj_bias_sums + at * a.O + row);
  }
}

// `width` columns of dmatrix at a time.
template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_mix_bwd_kernel(Paired<T> a, PairedBackward<T> g, int width) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(A, shared); // (O) and a strip (O, width), or (warps + 1, D)
  const int64_t b = blockIdx.y;
  const int h = blockIdx.x;
  if (h >= a.H && g.is_specialised) {
    if constexpr (sizeof(T) <= 4) {
      const int blocks =
          blocks_of_64(a.C) * (blocks_of_64(a.C) + (a.is_sum ? 0 : blocks_of_64(a.O)));
      weight_sums_mma(a, g, b, (h - a.H) / blocks, (h - a.H) % blocks,
                      reinterpret_cast<T *>(shared));
    }
    return;
  }
  if (h >= a.H) {
    const int of_q = (a.C + MATRIX_ROWS - 1) / MATRIX_ROWS;
    const int blocks = of_q + (a.is_sum ? 0 : (a.O + MATRIX_ROWS - 1) / MATRIX_ROWS);
    const int index = (h - a.H) / blocks, job = (h - a.H) % blocks;
    if (job < of_q) return q_weight_gradients(a, g, b, index, job * MATRIX_ROWS);
    return out_proj_gradients(a, g, b, index, (job - of_q) * MATRIX_ROWS);
  }
  value_gradients(a, g, b, h, shared, shared + a.O, width);
  A *totals = shared + PAIRED_WARPS * a.D;
  channel_gradients(a, g, b, h, shared, totals);
  spatial_gradients(a, g, b, h, totals);
}

} // namespace epa::cuda
