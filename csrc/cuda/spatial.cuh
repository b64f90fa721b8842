// Spatial attention: what the generic output pass and the one on tensor cores share, and what runs
// before and after them.
//
//   forward   [square_sums_fwd], output_fwd                 [] where normalize
//   backward  output_bwd, merge_bwd, [norm_bwd]
//   grid      (chunks of tokens, H, B); logits are scaled for exp2
//   sums      workspace: of q^2 (B, H, chunks, D) forward; of what makes the gradients of k_proj
//             and v_proj (B, H, chunks, 2, P, D) backward; added up in the order of chunks
#pragma once
#include "heads.cuh"

namespace epa::cuda {

constexpr int MERGE_THREADS = 256; // of kernels without a product

template <class T> struct Spatial {
  using A = Accumulate<T>;
  int64_t N, H, chunk; // tokens of a chunk
  int D, P;
  bool normalize;
  uint32_t threshold;
  const int64_t *seed;
  Heads<const T> q, k_proj, v_proj;
  const A *temperature;
  int64_t temperature_stride;
  A *q_norm;
};

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

// norm (D), shared: |q| of the block's head from `count` sums of squares, or ones where there are
// none. The caller's next barrier makes it visible.
template <class T>
__device__ void find_norm(const Spatial<T> &a, const Accumulate<T> *squares, int count,
                          Accumulate<T> *norm) {
  using A = Accumulate<T>;
  const int64_t head = int64_t(blockIdx.z) * a.H + blockIdx.y;
  for (int d = threadIdx.x; d < a.D; d += blockDim.x) {
    A value = 1;
    if (a.normalize) {
      A square = 0;
      for (int i = 0; i < count; ++i) square += squares[(head * count + i) * a.D + d];
      value = clamped_norm(square);
    }
    norm[d] = value;
    if (blockIdx.x == 0) a.q_norm[head * a.D + d] = value;
  }
}

// Of a head: gradients of k_proj, v_proj and temperature (B, H), and dnorm (B, H, D) = d|q| / |q|.
template <class T>
__global__ void __launch_bounds__(MERGE_THREADS)
    spatial_attention_merge_bwd_kernel(Spatial<T> a, Accumulate<T> *sums, int count,
                                       Heads<T> dk_proj, Heads<T> dv_proj,
                                       Accumulate<T> *dtemperature, Accumulate<T> *dnorm) {
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
