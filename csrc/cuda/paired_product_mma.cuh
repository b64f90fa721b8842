// The output projection on tensor cores, for every layer of which 64 columns fit in shared memory:
// in 16 bits C up to 304 forward, up to 608 backward; of float up to 112 and 224.
//
//   product_fwd  y_s = out_s' Wo1^T + bias, where out_s' went through memory     grid (jobs, B)
//   mix_fwd      dout = dy_s Wo1, a job of backward: 64 columns of a chunk of tokens
//
//   A block has its columns of the weight, rounded to T, and tokens in tiles of 64, 64 channels of
//   them at a time; a warp owns 16 tokens and 32 columns.
#pragma once
#include "paired_mma.cuh"

namespace epa::cuda {

// Elements of a column of the weight in shared memory: whole steps of 16, and of no bank twice.
__host__ __device__ __forceinline__ int projection_stride(int depth) {
  return (depth + 15) / 16 * 16 + 8;
}

// Job `job` of rows (N, C) to `to` (N, C), both of a sample.
template <class T, bool IS_BACK>
__device__ void project_mma(const Paired<T> &a, int job, int64_t chunk, const T *rows, T *to,
                            T *shared) {
  constexpr int GROUPS = MAP_GROUPS * MMA_WARPS / PAIRED_WARPS; // of 8 columns of a warp
  const int C = a.C, depth = IS_BACK ? a.O : C, width = IS_BACK ? C : a.O;
  const int blocks = blocks_of_64(width), first = job % blocks * 64;
  const int columns = width - first < 64 ? width - first : 64, stride = projection_stride(depth);
  const int64_t start = job / blocks * chunk, rest = a.N - start;
  const int64_t tokens = rest < chunk ? rest : chunk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int own_row = warp % MMA_WARPS * WARP_ROWS, own_column = warp / MMA_WARPS * GROUPS * 8;
  T *tile = shared, *matrix = tile + TILE_ROWS * MAP_STRIDE;
  rows += start * C, to += start * C + first;
  // Neighbouring threads read what lies next to each other.
  const int padded = stride - 8;
  for (int i = threadIdx.x; i < MAP_COLUMNS * padded; i += PAIRED_THREADS) {
    const int column = IS_BACK ? i % MAP_COLUMNS : i / padded;
    const int k = IS_BACK ? i / MAP_COLUMNS : i % padded;
    const int64_t at = IS_BACK ? int64_t(k) * C + first + column : int64_t(first + column) * C + k;
    const bool is_inside = column < columns && k < depth;
    matrix[column * stride + k] = narrow<T>(is_inside ? a.out_proj_weight[at] : 0.f);
  }
  for (int64_t n = 0; n < tokens; n += TILE_ROWS) {
    float sum[GROUPS][4] = {};
    for (int k = 0; k < depth; k += MAP_COLUMNS) {
      const int channels = depth - k < MAP_COLUMNS ? depth - k : MAP_COLUMNS;
      load_block(TokenBlock<T>{rows + k, C, 1, channels, nullptr}, n, tokens - n, nullptr, tile,
                 [](int row, int c) { return row * MAP_STRIDE + c; });
      __syncthreads();
      for (int step = 0; step < channels; step += DEPTH<T>) {
        Word<T> factor[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          factor[i] = word_at(tile + (own_row + g + 8 * (i % 2)) * MAP_STRIDE + step +
                              word_offset<T>(i / 2));
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
          const T *column = matrix + (own_column + 8 * j + g) * stride + k + step;
          const Word<T> other[2] = {word_at(column + word_offset<T>(0)),
                                    word_at(column + word_offset<T>(1))};
          mma<T>(sum[j], factor, other);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
      const int column = own_column + 8 * j + 2 * t;
      if (column >= columns) continue;
      const bool is_pair = column + 1 < columns;
      float bias[2] = {};
      if (!IS_BACK && a.out_proj_bias) {
        bias[0] = a.out_proj_bias[first + column];
        if (is_pair) bias[1] = a.out_proj_bias[first + column + 1];
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = n + own_row + g + 8 * r;
        if (row >= tokens) continue;
        const float low = sum[j][2 * r] + bias[0], high = sum[j][2 * r + 1] + bias[1];
        if (is_pair)
          store_pair(to + row * C, 1, column, low, high);
        else
          to[row * C + column] = narrow<T>(low);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_product_fwd_mma_kernel(Paired<T> a, int64_t chunk, const T *out_s, T *y) {
  EPA_DYNAMIC_SHARED(T, shared);
  const int64_t sample = blockIdx.y * a.N * a.C;
  project_mma<T, false>(a, blockIdx.x, chunk, out_s + sample, y + sample, shared);
}

} // namespace epa::cuda
