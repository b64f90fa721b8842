// What the passes of paired attention on tensor cores share. They take T of 16 bits and D in
// {8, 16, 32, 64}, or float and D in {8, 16}; P up to 64, C a multiple of 32 up to 256, of float up
// to 96. The summary forward and the product take more, as their files say.
//
//   A block's warps have 16 tokens each of a tile of 64. x comes in blocks of 32 channels. Sums
//   over tokens are left^T right by token_products, 64 x 64 of it a block.
#pragma once
#include "fragments.cuh"
#include "paired.cuh"

namespace epa::cuda {

// Channels of x that a step of a product takes, and elements of a row of them in shared memory.
constexpr int CHANNEL_BLOCK = 32, CHANNEL_STRIDE = ROW_STRIDE<CHANNEL_BLOCK>;

// Channels of x, `first` to first + 31, of a warp's 16 tokens.
template <class T>
__device__ __forceinline__ void load_x(const Paired<T> &a, T *to, int64_t b, int64_t n,
                                       int64_t stop, int first) {
  load_rows<T, CHANNEL_BLOCK>(to, &a.x.at(b, n, first), a.x.stride_n, a.x.stride_c, stop - n,
                              WARP_ROWS, threadIdx.x % 32, 32);
}

__host__ __device__ __forceinline__ int blocks_of_64(int size) { return (size + 63) / 64; }

// Columns of tokens, from a chunk's first token on; those from `columns` on count as zero.
template <class T> struct TokenBlock {
  const T *data;
  int64_t stride_n, stride_c;
  int columns;
  const double *mean; // to be subtracted, or null
};

// 64 tokens of 64 columns to shared memory, where at(token, column) says; zeros from `tokens` on.
template <class T, class At>
__device__ __forceinline__ void load_block(const TokenBlock<T> &from, int64_t n, int64_t tokens,
                                           const float *mean, T *to, At at) {
  constexpr int VECTOR = 16 / sizeof(T);
  const bool is_aligned = from.stride_c == 1 && from.stride_n % VECTOR == 0 &&
                          reinterpret_cast<uintptr_t>(from.data) % 16 == 0;
  for (int i = threadIdx.x; i < TILE_ROWS * MAP_COLUMNS / VECTOR; i += blockDim.x) {
    const int row = i / (MAP_COLUMNS / VECTOR), c = i % (MAP_COLUMNS / VECTOR) * VECTOR;
    const T *source = from.data + (n + row) * from.stride_n + c * from.stride_c;
    alignas(16) T values[VECTOR];
    if (is_aligned && row < tokens && c + VECTOR <= from.columns) {
      *reinterpret_cast<uint4 *>(values) = *reinterpret_cast<const uint4 *>(source);
    } else {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e)
        values[e] =
            row < tokens && c + e < from.columns ? source[e * from.stride_c] : narrow<T>(0.f);
    }
    if (from.mean && row < tokens) {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) values[e] = narrow<T>(widen(values[e]) - mean[c + e]);
    }
    *reinterpret_cast<uint4 *>(to + at(row, c)) = *reinterpret_cast<const uint4 *>(values);
  }
}

template <class T>
constexpr int64_t TOKEN_PRODUCTS_SHARED = // bytes
    (TILE_ROWS * MAP_STRIDE + 2 * TILE_ROWS * CHANNEL_STRIDE) * sizeof(T) + MAP_COLUMNS * 4;

// to (.., stride) = left^T right over the tokens of a chunk, and sums of left's columns where asked
// for. Warps beyond the fourth have the second half of the columns.
template <class T, int THREADS>
__device__ void token_products(const TokenBlock<T> &left, const TokenBlock<T> &right,
                               int64_t tokens, T *shared, float *to, int stride, float *left_sums) {
  constexpr int HALVES = 2 * MMA_THREADS / THREADS, HALF = TILE_ROWS * CHANNEL_STRIDE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  T *left_tile = shared, *right_tile = left_tile + TILE_ROWS * MAP_STRIDE;
  float *mean = reinterpret_cast<float *>(right_tile + 2 * HALF);
  for (int c = threadIdx.x; c < MAP_COLUMNS; c += THREADS)
    mean[c] = right.mean && c < right.columns ? float(right.mean[c]) : 0.f;
  __syncthreads();
  float sum[HALVES][CHANNEL_BLOCK / 8][4] = {}, total = 0;
  for (int64_t n = 0; n < tokens; n += TILE_ROWS) {
    load_block(left, n, tokens - n, nullptr, left_tile,
               [](int row, int c) { return row * MAP_STRIDE + c; });
    load_block(right, n, tokens - n, mean, right_tile, [](int row, int c) {
      return c / CHANNEL_BLOCK * HALF + row * CHANNEL_STRIDE + c % CHANNEL_BLOCK;
    });
    __syncthreads();
#pragma unroll
    for (int i = 0; i < HALVES; ++i)
      add_products<T, CHANNEL_BLOCK>(sum[i], left_tile, right_tile + (i + warp / MMA_WARPS) * HALF);
    if (left_sums && threadIdx.x < MAP_COLUMNS)
      for (int row = 0; row < TILE_ROWS; ++row)
        total += widen(left_tile[row * MAP_STRIDE + threadIdx.x]);
    __syncthreads();
  }
  if (left_sums && int(threadIdx.x) < left.columns) left_sums[threadIdx.x] = total;
#pragma unroll
  for (int half = 0; half < HALVES; ++half)
#pragma unroll
    for (int c = 0; c < CHANNEL_BLOCK / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp % MMA_WARPS * 16 + g + i / 2 * 8;
        const int column = (half + warp / MMA_WARPS) * CHANNEL_BLOCK + 8 * c + 2 * t + i % 2;
        if (row < left.columns && column < right.columns)
          to[int64_t(row) * stride + column] = sum[half][c][i];
      }
}

// Columns from `first` on, 64 of them, of a dense (B, N, C); the rest lies beyond `end`.
template <class T>
__device__ __forceinline__ TokenBlock<T> token_block(const T *data, int64_t at, int C, int first,
                                                     int end) {
  return {data + at * C + first, C, 1, end - first < MAP_COLUMNS ? end - first : MAP_COLUMNS,
          nullptr};
}

template <class T>
__device__ __forceinline__ TokenBlock<T> centred_block(const Paired<T> &a, int64_t b, int64_t n,
                                                       int first) {
  const int rest = a.C - first;
  return {&a.x.at(b, n, first), a.x.stride_n, a.x.stride_c, rest < MAP_COLUMNS ? rest : MAP_COLUMNS,
          a.mean + b * a.C + first};
}

// `float16_scale` of the largest of the block's numbers.
// Every thread of the block must come here.
__device__ __forceinline__ float power_of_two(float largest) {
  EPA_SHARED(float, maxima, [MMA_WARPS]);
  largest = warp_max(largest);
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < MMA_WARPS; ++i) largest = fmaxf(largest, maxima[i]);
  __syncthreads();
  return float16_scale(largest);
}

} // namespace epa::cuda
