// Spatial attention's output pass for every D, P and dtype.
//
//   both      a warp owns a token: its lanes are projected tokens, then channels
//   backward  a tile's rows of the map lie in shared memory; there a thread owns elements of the
//             sums
#pragma once
#include "spatial.cuh"

namespace epa::cuda {

constexpr int GENERIC_WARPS = 4, GENERIC_THREADS = 32 * GENERIC_WARPS;

// weights (P), shared and a warp's own: softmax of a token's logits. Every lane writes and may read
// the columns lane, lane + 32, ... until the next __syncwarp.
template <class T>
__device__ void softmax_row(const Spatial<T> &a, const T *q, const T *k, const Accumulate<T> *scale,
                            Accumulate<T> *weights) {
  using A = Accumulate<T>;
  const int lane = threadIdx.x % 32;
  for (int p = lane; p < a.P; p += 32) {
    A logit = 0;
    for (int d = 0; d < a.D; ++d)
      logit += widen(q[d * a.q.stride_d]) * scale[d] *
               widen(k[p * a.k_proj.stride_n + d * a.k_proj.stride_d]);
    weights[p] = logit;
  }
  softmax(weights, a.P);
}

template <class T>
__global__ void __launch_bounds__(GENERIC_THREADS)
    spatial_attention_output_fwd_kernel(Spatial<T> a, const Accumulate<T> *squares, int count,
                                        Heads<T> out) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(A, scale); // (D), then (warps, P)
  const int64_t index = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int64_t first = index * a.chunk, past = first + a.chunk, stop = past < a.N ? past : a.N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  A *weights = scale + a.D + warp * a.P;
  const A t = a.temperature[h * a.temperature_stride] * A(LOG2_E);
  find_norm(a, squares, count, scale);
  for (int d = threadIdx.x; d < a.D; d += blockDim.x) scale[d] = t / scale[d];
  __syncthreads();
  const T *k = a.k_proj.row(b, 0, h), *v = a.v_proj.row(b, 0, h);
  const A multiplier = a.threshold ? A(dropout_scale(a.threshold)) : A(1);
  const int64_t seed = a.threshold ? *a.seed : 0;
  for (int64_t n = first + warp; n < stop; n += GENERIC_WARPS) {
    softmax_row(a, a.q.row(b, n, h), k, scale, weights);
    if (a.threshold)
      for (int p = lane; p < a.P; p += 32)
        if (!is_kept(seed, (b * a.H + h) * a.N + n, p, SPATIAL_MAP, a.threshold)) weights[p] = 0;
    __syncwarp();
    T *row = out.row(b, n, h);
    for (int d = lane; d < a.D; d += 32) {
      A sum = 0;
      for (int p = 0; p < a.P; ++p)
        sum += weights[p] * widen(v[p * a.v_proj.stride_n + d * a.v_proj.stride_d]);
      row[d * out.stride_d] = narrow<T>(sum * multiplier);
    }
    __syncwarp();
  }
}

// dq without the norm's part, sums; `rows` tokens a tile. Bounds on the registers, since ptxas aims
// at more blocks by itself, and then spills.
template <class T>
__global__ void __launch_bounds__(GENERIC_THREADS, 4)
    spatial_attention_output_bwd_kernel(Spatial<T> a, Heads<const T> dout, Heads<T> dq,
                                        Accumulate<T> *sums, int rows) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(A, scale); // (D), then (rows, P) twice
  const int64_t index = blockIdx.x, h = blockIdx.y, b = blockIdx.z, head = b * a.H + h;
  const int64_t first = index * a.chunk, past = first + a.chunk, stop = past < a.N ? past : a.N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  A *attention = scale + a.D, *dlogits = attention + rows * a.P;
  const A t = a.temperature[h * a.temperature_stride];
  for (int d = threadIdx.x; d < a.D; d += blockDim.x)
    scale[d] = t * A(LOG2_E) / a.q_norm[head * a.D + d];
  __syncthreads();
  const T *k = a.k_proj.row(b, 0, h), *v = a.v_proj.row(b, 0, h);
  const A multiplier = a.threshold ? A(dropout_scale(a.threshold)) : A(1);
  const int64_t seed = a.threshold ? *a.seed : 0;
  A *dkeys = sums + (head * gridDim.x + index) * 2 * a.P * a.D, *dvalues = dkeys + a.P * a.D;
  for (int64_t start = first; start < stop; start += rows) {
    const int inside = stop - start < rows ? int(stop - start) : rows;
    for (int i = warp; i < inside; i += GENERIC_WARPS) {
      A *weights = attention + i * a.P, *dlogit = dlogits + i * a.P;
      const int64_t n = start + i;
      const T *gradient = dout.row(b, n, h);
      softmax_row(a, a.q.row(b, n, h), k, scale, weights);
      A along = 0;
      for (int p = lane; p < a.P; p += 32) {
        const bool is_dropped =
            a.threshold && !is_kept(seed, head * a.N + n, p, SPATIAL_MAP, a.threshold);
        A dattention = 0;
        for (int d = 0; d < a.D; ++d)
          dattention += widen(gradient[d * dout.stride_d]) *
                        widen(v[p * a.v_proj.stride_n + d * a.v_proj.stride_d]);
        dlogit[p] = is_dropped ? A(0) : dattention * multiplier;
        along += weights[p] * dlogit[p];
      }
      along = warp_sum(along);
      for (int p = lane; p < a.P; p += 32) {
        dlogit[p] = weights[p] * (dlogit[p] - along);
        if (a.threshold)
          weights[p] *=
              is_kept(seed, head * a.N + n, p, SPATIAL_MAP, a.threshold) ? multiplier : A(0);
      }
      __syncwarp();
      for (int d = lane; d < a.D; d += 32) {
        A sum = 0;
        for (int p = 0; p < a.P; ++p)
          sum += dlogit[p] * widen(k[p * a.k_proj.stride_n + d * a.k_proj.stride_d]);
        dq.row(b, n, h)[d * dq.stride_d] = narrow<T>(sum * t / a.q_norm[head * a.D + d]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.P * a.D; i += blockDim.x) {
      const int p = i / a.D, d = i % a.D;
      A dkey = 0, dvalue = 0;
      for (int j = 0; j < inside; ++j) {
        dkey += dlogits[j * a.P + p] * widen(a.q.row(b, start + j, h)[d * a.q.stride_d]);
        dvalue += attention[j * a.P + p] * widen(dout.row(b, start + j, h)[d * dout.stride_d]);
      }
      dkeys[i] = start == first ? dkey : dkeys[i] + dkey;
      dvalues[i] = start == first ? dvalue : dvalues[i] + dvalue;
    }
    __syncthreads();
  }
}

} // namespace epa::cuda
