// Tokens by head and dropout, as every kernel takes them.
#pragma once
#include "../philox.h"
#include "launch.h"
#include "numbers.h"

namespace epa::cuda {

// Tokens, or projected ones, by head: (B, N, H, D).
template <class T> struct Heads {
  T *data;
  int64_t stride_b, stride_n, stride_h, stride_d;

  __device__ __forceinline__ T *row(int64_t b, int64_t n, int64_t h) const {
    return data + b * stride_b + n * stride_n + h * stride_h;
  }
};

// Whether dropout keeps a column of a row of the map.
__device__ __forceinline__ bool is_kept(int64_t seed, int64_t row, int column, uint32_t map,
                                        uint32_t threshold) {
  uint16_t halves[COLUMNS_PER_COUNTER];
  philox(seed, row, column / COLUMNS_PER_COUNTER, map, halves);
  // Selected, not indexed: an index that is no constant puts an array into memory.
  uint32_t half = 0;
  for (int i = 0; i < COLUMNS_PER_COUNTER; ++i)
    if (i == column % COLUMNS_PER_COUNTER) half = halves[i];
  return half >= threshold;
}

// 0 where dropout drops it, else what keeps the mean.
template <class A>
__device__ __forceinline__ A dropout_multiplier(int64_t seed, int64_t row, int column, uint32_t map,
                                                uint32_t threshold) {
  return is_kept(seed, row, column, map, threshold) ? A(dropout_scale(threshold)) : A(0);
}

// A warp's row of logits, scaled for exp2, to its softmax. A lane reads and writes the columns
// lane, lane + 32, ... Loops are not unrolled, which would take half of the time to compile.
template <class A> __device__ void softmax(A *row, int columns) {
  const int lane = threadIdx.x % 32;
  A largest = -INFINITY, total = 0;
#pragma unroll 1
  for (int i = lane; i < columns; i += 32) largest = row[i] > largest ? row[i] : largest;
  largest = warp_max(largest);
#pragma unroll 1
  for (int i = lane; i < columns; i += 32) {
    row[i] = exp2(row[i] - largest);
    total += row[i];
  }
  total = warp_sum(total);
#pragma unroll 1
  for (int i = lane; i < columns; i += 32) row[i] /= total;
}

} // namespace epa::cuda
