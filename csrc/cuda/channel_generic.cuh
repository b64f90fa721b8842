// Channel attention's passes over the tokens for every D and dtype.
#pragma once
#include "channel.cuh"

namespace epa::cuda {

constexpr int GRAM_ELEMENTS = 16; // sums of a thread at a time

// `rows` tokens a tile.
template <class T>
__global__ void __launch_bounds__(CHANNEL_THREADS)
    channel_attention_gram_kernel(int64_t N, int64_t H, int D, int64_t chunk, Heads<const T> left,
                                  Heads<const T> right, bool has_norms, Accumulate<T> *sums,
                                  int rows) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(A, left_tile); // (rows, D) twice
  EPA_SHARED(A, parts, [CHANNEL_THREADS]);
  A *right_tile = left_tile + rows * D;
  const int64_t index = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int64_t first = index * chunk, past = first + chunk, stop = past < N ? past : N;
  const int size = D * D, length = has_norms ? size + 2 * D : size;
  // Fewer elements than threads: `groups` threads share one, each with tokens of its own.
  const int groups = CHANNEL_THREADS / length > 1 ? CHANNEL_THREADS / length : 1;
  const int stride = groups > 1 ? length : CHANNEL_THREADS;
  const int group = threadIdx.x / stride, own = threadIdx.x % stride;
  sums += ((b * H + h) * gridDim.x + index) * length;
  for (int start = 0; start < length; start += stride * GRAM_ELEMENTS) {
    A total[GRAM_ELEMENTS] = {};
    for (int64_t n = first; n < stop; n += rows) {
      const int inside = stop - n < rows ? int(stop - n) : rows;
      for (int i = threadIdx.x; i < inside * D; i += CHANNEL_THREADS) {
        const int64_t row = n + i / D, d = i % D;
        left_tile[i] = widen(left.row(b, row, h)[d * left.stride_d]);
        right_tile[i] = widen(right.row(b, row, h)[d * right.stride_d]);
      }
      __syncthreads();
#pragma unroll
      for (int e = 0; e < GRAM_ELEMENTS; ++e) {
        const int element = start + e * stride + own;
        if (element >= length || group >= groups) continue;
        const int of_norms = element - size;
        const A *one = left_tile + element / D, *other = right_tile + element % D;
        if (of_norms >= 0) one = other = (of_norms < D ? left_tile : right_tile) + of_norms % D;
        for (int i = group; i < inside; i += groups) total[e] += one[i * D] * other[i * D];
      }
      __syncthreads();
    }
    if (groups > 1) {
      parts[threadIdx.x] = total[0];
      __syncthreads();
      if (group == 0)
        for (int i = 1; i < groups; ++i) total[0] += parts[i * stride + own];
    }
#pragma unroll
    for (int e = 0; e < GRAM_ELEMENTS; ++e) {
      const int element = start + e * stride + own;
      if (element < length && group == 0) sums[element] = total[e];
    }
  }
}

// Block x of the grid makes chunk x / count of product x % count.
template <class T>
__global__ void __launch_bounds__(CHANNEL_THREADS)
    channel_attention_product_kernel(int64_t N, int64_t H, int D, int64_t chunk,
                                     ChannelProducts<T> products) {
  using A = Accumulate<T>;
  const int64_t index = blockIdx.x / products.count, h = blockIdx.y, b = blockIdx.z;
  const ChannelProduct<T> &product = products.product[blockIdx.x % products.count];
  const int64_t first = index * chunk, past = first + chunk, stop = past < N ? past : N;
  const A *matrix = product.matrix + (b * H + h) * D * D;
  for (int64_t i = threadIdx.x; i < (stop - first) * D; i += CHANNEL_THREADS) {
    const int64_t n = first + i / D, d = i % D;
    const T *tokens = product.tokens.row(b, n, h);
    A sum = 0;
    for (int j = 0; j < D; ++j)
      sum += widen(tokens[j * product.tokens.stride_d]) * matrix[j * D + d];
    if (product.factor)
      sum += widen(product.more.row(b, n, h)[d * product.more.stride_d]) *
             product.factor[(b * H + h) * D + d];
    product.result.row(b, n, h)[d * product.result.stride_d] = narrow<T>(sum);
  }
}

} // namespace epa::cuda
