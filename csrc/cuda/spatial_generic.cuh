// Spatial attention for every D, P and dtype, and what the specialised kernels leave to it.
//
//   forward   [square_sums], fwd       backward  bwd, merge, [norm_bwd]      [] where normalize
//   fwd, bwd  a warp owns a token: its lanes are projected tokens, then channels
//   bwd       a tile's rows of the map lie in shared memory; there a thread owns elements of the sums
#pragma once
#include "spatial.cuh"

namespace epa::cuda {

constexpr int GENERIC_WARPS = 4, GENERIC_THREADS = 32 * GENERIC_WARPS, MERGE_THREADS = 256;

// squares (B, H, chunks, D) = sum_n q^2
template <class T>
__global__ void __launch_bounds__(MERGE_THREADS)
    spatial_attention_square_sums_fwd_kernel(Spatial<T> a, Accumulate<T> *squares) {
  using A = Accumulate<T>;
  EPA_SHARED(A, parts, [MERGE_THREADS]);
  const int64_t index = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int64_t first = index * a.chunk, past = first + a.chunk, stop = past < a.N ? past : a.N;
  int width = 1; // channels side by side, a power of two
  while (width < a.D && width < 32) width *= 2;
  const int rows = MERGE_THREADS / width, row = threadIdx.x / width;
  for (int start = 0; start < a.D; start += width) {
    const int d = start + threadIdx.x % width;
    A sum = 0;
    if (d < a.D)
      for (int64_t n = first + row; n < stop; n += rows) {
        const A value = widen(a.q.row(b, n, h)[d * a.q.stride_d]);
        sum += value * value;
      }
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (row == 0 && d < a.D) {
      for (int i = 1; i < rows; ++i) sum += parts[i * width + threadIdx.x];
      squares[((b * a.H + h) * gridDim.x + index) * a.D + d] = sum;
    }
    __syncthreads();
  }
}

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

// Of a head: gradients of k_proj, v_proj and temperature (B, H), and dnorm (B, H, D) = d|q| / |q|.
template <class T>
__global__ void __launch_bounds__(MERGE_THREADS)
    spatial_attention_merge_bwd_kernel(Spatial<T> a, Accumulate<T> *sums, int count, Heads<T> dk_proj,
                                   Heads<T> dv_proj, Accumulate<T> *dtemperature,
                                   Accumulate<T> *dnorm) {
  using A = Accumulate<T>;
  EPA_SHARED(A, totals, [MERGE_THREADS]);
  const int64_t h = blockIdx.y, b = blockIdx.z, head = b * a.H + h;
  const int size = a.P * a.D;
  const A t = a.temperature[h * a.temperature_stride];
  sums += head * count * 2 * size;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const int p = i / a.D, d = i % a.D;
    A dkey = 0, dvalue = 0;
    for (int64_t j = 0; j < count; ++j) {
      dkey += sums[j * 2 * size + i];
      dvalue += sums[(j * 2 + 1) * size + i];
    }
    const A norm = a.q_norm[head * a.D + d];
    dk_proj.row(b, p, h)[d * dk_proj.stride_d] = narrow<T>(dkey * (t / norm));
    dv_proj.row(b, p, h)[d * dv_proj.stride_d] = narrow<T>(dvalue);
    // Nobody else reads this element before the barrier.
    sums[i] = dkey * widen(a.k_proj.row(b, p, h)[d * a.k_proj.stride_d]) / norm;
  }
  __syncthreads();
  A total = 0;
  for (int d = threadIdx.x; d < a.D; d += blockDim.x) {
    A along = 0;
    for (int p = 0; p < a.P; ++p) along += sums[p * a.D + d];
    dnorm[head * a.D + d] = norm_gradient(along * t, a.q_norm[head * a.D + d]);
    total += along;
  }
  totals[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < MERGE_THREADS; ++i) total += totals[i];
    dtemperature[head] = total;
  }
}

// dq += q d|q| / |q|
template <class T>
__global__ void __launch_bounds__(MERGE_THREADS)
    spatial_attention_norm_bwd_kernel(Spatial<T> a, const Accumulate<T> *dnorm, Heads<T> dq) {
  const int64_t index = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int64_t first = index * a.chunk, past = first + a.chunk, stop = past < a.N ? past : a.N;
  for (int64_t i = threadIdx.x; i < (stop - first) * a.D; i += blockDim.x) {
    const int64_t n = first + i / a.D, d = i % a.D;
    T *to = dq.row(b, n, h) + d * dq.stride_d;
    const T q = a.q.row(b, n, h)[d * a.q.stride_d];
    *to = narrow<T>(widen(*to) + widen(q) * dnorm[(b * a.H + h) * a.D + d]);
  }
}

} // namespace epa::cuda
