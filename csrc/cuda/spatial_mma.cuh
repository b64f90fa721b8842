// Spatial attention on tensor cores, D in {8, 16, 32, 64}, P up to 64, T __nv_bfloat16 or __half.
//
//   A warp owns 16 tokens of a head, rows g and g + 8 of a lane with g = lane / 4; the map's rows
//   never leave its registers forward: an accumulator, packed, is the next product's factor.
//   Backward, sums over tokens need the map transposed: it goes through shared memory, where each
//   warp then owns 16 projected tokens of both sums.
//   k_proj and v_proj lie in shared memory once a block. Rows are padded by 16 bytes, so that the
//   words of 8 rows lie in different banks; up to 46 KB a block, for D = 64 backward.
#pragma once
#include "ptx.h"
#include "spatial.cuh"

namespace epa::cuda {

constexpr int MMA_WARPS = 4, MMA_THREADS = 32 * MMA_WARPS, WARP_ROWS = 16;
constexpr int TILE_ROWS = MMA_WARPS * WARP_ROWS;
constexpr int MAP_COLUMNS = 64, MAP_GROUPS = MAP_COLUMNS / 8, MAP_STRIDE = MAP_COLUMNS + 8;
template <int D> constexpr int ROW_STRIDE = D == 8 ? 8 : D + 8; // elements

static_assert(MMA_WARPS * WARP_ROWS == MAP_COLUMNS, "backward, each warp owns 16 columns");

// A warp's rows of tokens as the first factor of products over D.
template <int D> struct RowFactor {
  static constexpr int STEPS = D == 8 ? 1 : D / 16, WORDS = D == 8 ? 2 : 4;
  uint32_t word[STEPS][WORDS];
};

// `rows` rows of D channels to shared memory, zeros from row `inside` on.
template <class T, int D>
__device__ void load_rows(T *to, const T *from, int64_t stride_n, int64_t stride_d, int64_t inside,
                          int rows, int thread, int threads) {
  constexpr int VECTOR = 16 / sizeof(T);
  const bool is_aligned =
      stride_d == 1 && stride_n % VECTOR == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  if (is_aligned) {
    for (int i = thread; i < rows * (D / VECTOR); i += threads) {
      const int row = i / (D / VECTOR), d = i % (D / VECTOR) * VECTOR;
      uint4 value = {0, 0, 0, 0};
      if (row < inside) value = *reinterpret_cast<const uint4 *>(from + row * stride_n + d);
      *reinterpret_cast<uint4 *>(to + row * ROW_STRIDE<D> + d) = value;
    }
  } else {
    for (int i = thread; i < rows * D; i += threads) {
      const int row = i / D, d = i % D;
      to[row * ROW_STRIDE<D> + d] =
          row < inside ? from[row * stride_n + d * stride_d] : narrow<T>(0.f);
    }
  }
}

// Columns d, d + 1 of a row of global memory.
template <class T>
__device__ __forceinline__ void store_pair(T *row, int64_t stride_d, int d, float low, float high) {
  T *to = row + d * stride_d;
  if (stride_d == 1 && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t *>(to) = pack<T>(low, high);
  } else {
    to[0] = narrow<T>(low);
    to[stride_d] = narrow<T>(high);
  }
}

template <class T> __device__ __forceinline__ uint32_t word_at(const T *pair) {
  return *reinterpret_cast<const uint32_t *>(pair);
}

template <class T, int D> __device__ __forceinline__ RowFactor<D> row_factor(const T *rows) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  RowFactor<D> result;
#pragma unroll
  for (int step = 0; step < RowFactor<D>::STEPS; ++step)
#pragma unroll
    for (int i = 0; i < RowFactor<D>::WORDS; ++i)
      result.word[step][i] =
          word_at(rows + (g + 8 * (i % 2)) * ROW_STRIDE<D> + 16 * step + 2 * t + 8 * (i / 2));
  return result;
}

// The same of rows whose channels are multiplied by scale (D), rounded to T.
template <class T, int D>
__device__ __forceinline__ RowFactor<D> row_factor(const T *rows, const float *scale) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  RowFactor<D> result;
#pragma unroll
  for (int step = 0; step < RowFactor<D>::STEPS; ++step)
#pragma unroll
    for (int i = 0; i < RowFactor<D>::WORDS; ++i) {
      const int d = 16 * step + 2 * t + 8 * (i / 2);
      const T *pair = rows + (g + 8 * (i % 2)) * ROW_STRIDE<D> + d;
      result.word[step][i] = pack<T>(widen(pair[0]) * scale[d], widen(pair[1]) * scale[d + 1]);
    }
  return result;
}

// map (16, 64) = rows matrix^T, matrix (64, D)
template <class T, int D>
__device__ __forceinline__ void multiply_transposed(float (&map)[MAP_GROUPS][4],
                                                    const RowFactor<D> &rows, const T *matrix) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < MAP_GROUPS; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) map[j][i] = 0;
#pragma unroll
    for (int step = 0; step < RowFactor<D>::STEPS; ++step) {
      uint32_t factor[RowFactor<D>::WORDS / 2];
#pragma unroll
      for (int i = 0; i < RowFactor<D>::WORDS / 2; ++i)
        factor[i] = word_at(matrix + (8 * j + g) * ROW_STRIDE<D> + 16 * step + 2 * t + 8 * i);
      mma<T>(map[j], rows.word[step], factor);
    }
  }
}

// result (16, D) = map (16, 64) matrix (64, D), the map rounded to T
template <class T, int D>
__device__ __forceinline__ void multiply_map(float (&result)[D / 8][4],
                                             const float (&map)[MAP_GROUPS][4], const T *matrix) {
#pragma unroll
  for (int c = 0; c < D / 8; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) result[c][i] = 0;
#pragma unroll
  for (int k = 0; k < MAP_COLUMNS / 16; ++k) {
    const float(&low)[4] = map[2 * k], (&high)[4] = map[2 * k + 1];
    const uint32_t factor[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]),
                                pack<T>(high[0], high[1]), pack<T>(high[2], high[3])};
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      uint32_t other[2];
      load_transposed(other, matrix + (16 * k + threadIdx.x % 16) * ROW_STRIDE<D> + 8 * c);
      mma<T>(result[c], factor, other);
    }
  }
}

// sum (16, D) += map^T rows over the tile's tokens; of the map the columns of this warp.
template <class T, int D>
__device__ __forceinline__ void add_products(float (&sum)[D / 8][4], const T *map, const T *rows) {
  const int lane = threadIdx.x % 32, p = threadIdx.x / 32 * 16;
#pragma unroll
  for (int k = 0; k < TILE_ROWS / 16; ++k) {
    uint32_t factor[4];
    load_transposed(factor,
                    map + (16 * k + lane % 8 + lane / 16 * 8) * MAP_STRIDE + p + lane / 8 % 2 * 8);
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      uint32_t other[2];
      load_transposed(other, rows + (16 * k + lane % 16) * ROW_STRIDE<D> + 8 * c);
      mma<T>(sum[c], factor, other);
    }
  }
}

// A warp's rows of the map, rounded to T, to shared memory.
template <class T>
__device__ __forceinline__ void store_map(T *to, const float (&map)[MAP_GROUPS][4]) {
  const int row = threadIdx.x / 32 * WARP_ROWS + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      *reinterpret_cast<uint32_t *>(to + (row + 8 * r) * MAP_STRIDE + 8 * j + 2 * t) =
          pack<T>(map[j][2 * r], map[j][2 * r + 1]);
}

// map = exp2(factor map - maximum of its row), 0 from column P on; total, its sums.
__device__ __forceinline__ void exp2_rows(float (&map)[MAP_GROUPS][4], float (&total)[2], int P,
                                          float factor) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float &logit = map[j][2 * r + i];
        logit = 8 * j + 2 * t + i < P ? logit * factor : -INFINITY;
        largest = fmaxf(largest, logit);
      }
    largest = warp_max(largest, 4);
    total[r] = 0;
#pragma unroll
    for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        map[j][2 * r + i] = exp2_approximate(map[j][2 * r + i] - largest);
        total[r] += map[j][2 * r + i];
      }
    total[r] = warp_sum(total[r], 4);
  }
}

// Bit 4 j + 2 r + i: whether dropout keeps column 8 j + 2 t + i of row + 8 r.
__device__ __forceinline__ uint32_t kept_bits(int64_t seed, int64_t row, uint32_t threshold) {
  const int t = threadIdx.x % 4;
  uint32_t bits = 0;
  // Not unrolled: sixteen counters at once spill.
#pragma unroll 1
  for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint16_t halves[COLUMNS_PER_COUNTER];
      philox(seed, row + 8 * r, j, SPATIAL_MAP, halves);
      // Selected, not indexed: an index that is no constant puts an array into memory.
      uint32_t low = 0, high = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i == t) low = halves[2 * i], high = halves[2 * i + 1];
      bits |= (uint32_t(low >= threshold) | uint32_t(high >= threshold) << 1) << (4 * j + 2 * r);
    }
  return bits;
}

template <class T, int D>
__global__ void __launch_bounds__(MMA_THREADS)
    spatial_attention_mma_fwd_kernel(Spatial<T> a, const float *squares, int count, Heads<T> out) {
  EPA_SHARED(T, keys, [MAP_COLUMNS * ROW_STRIDE<D>]);
  EPA_SHARED(T, values, [MAP_COLUMNS * ROW_STRIDE<D>]);
  EPA_SHARED(T, tiles, [TILE_ROWS * ROW_STRIDE<D>]);
  EPA_SHARED(float, scale, [D]);
  const int64_t index = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int64_t first = index * a.chunk, past = first + a.chunk, stop = past < a.N ? past : a.N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float factor = a.temperature[h * a.temperature_stride] * float(LOG2_E);
  load_rows<T, D>(keys, a.k_proj.row(b, 0, h), a.k_proj.stride_n, a.k_proj.stride_d, a.P,
                  MAP_COLUMNS, threadIdx.x, MMA_THREADS);
  load_rows<T, D>(values, a.v_proj.row(b, 0, h), a.v_proj.stride_n, a.v_proj.stride_d, a.P,
                  MAP_COLUMNS, threadIdx.x, MMA_THREADS);
  find_norm(a, squares, count, scale);
  for (int d = threadIdx.x; d < D; d += blockDim.x) scale[d] = factor / scale[d];
  __syncthreads();
  const float multiplier = a.threshold ? float(dropout_scale(a.threshold)) : 1.f;
  const int64_t seed = a.threshold ? *a.seed : 0;
  T *tile = tiles + warp * WARP_ROWS * ROW_STRIDE<D>;
  for (int64_t n = first + warp * WARP_ROWS; n < stop; n += TILE_ROWS) {
    load_rows<T, D>(tile, a.q.row(b, n, h), a.q.stride_n, a.q.stride_d, stop - n, WARP_ROWS, lane,
                    32);
    __syncwarp();
    float map[MAP_GROUPS][4], total[2], result[D / 8][4];
    // Where q is not normalised, it has no rounding to come: the factor waits for the product.
    multiply_transposed<T, D>(
        map, a.normalize ? row_factor<T, D>(tile, scale) : row_factor<T, D>(tile), keys);
    exp2_rows(map, total, a.P, a.normalize ? 1.f : factor);
    const uint32_t kept =
        a.threshold ? kept_bits(seed, (b * a.H + h) * a.N + n + g, a.threshold) : 0xFFFFFFFF;
#pragma unroll
    for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(kept >> (4 * j + i) & 1)) map[j][i] = 0;
    multiply_map<T, D>(result, map, values);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (n + g + 8 * r >= stop) continue;
      const float divided = multiplier / total[r];
      T *row = out.row(b, n + g + 8 * r, h);
#pragma unroll
      for (int c = 0; c < D / 8; ++c)
        store_pair(row, out.stride_d, 8 * c + 2 * t, result[c][2 * r] * divided,
                   result[c][2 * r + 1] * divided);
    }
    __syncwarp();
  }
}

// dq without the norm's part, sums. Three blocks of registers: left to itself, ptxas spills to have
// more on sm_80 and sm_120.
template <class T, int D>
__global__ void __launch_bounds__(MMA_THREADS, 3)
    spatial_attention_mma_bwd_kernel(Spatial<T> a, Heads<const T> dout, Heads<T> dq, float *sums) {
  EPA_SHARED(T, keys, [MAP_COLUMNS * ROW_STRIDE<D>]);
  EPA_SHARED(T, values, [MAP_COLUMNS * ROW_STRIDE<D>]);
  EPA_SHARED(T, tile, [TILE_ROWS * ROW_STRIDE<D>]);
  EPA_SHARED(T, gradients, [TILE_ROWS * ROW_STRIDE<D>]);
  EPA_SHARED(T, maps, [TILE_ROWS * MAP_STRIDE]);
  EPA_SHARED(float, scale, [D]);
  const int64_t index = blockIdx.x, h = blockIdx.y, b = blockIdx.z, head = b * a.H + h;
  const int64_t first = index * a.chunk, past = first + a.chunk, stop = past < a.N ? past : a.N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float factor = a.temperature[h * a.temperature_stride] * float(LOG2_E);
  load_rows<T, D>(keys, a.k_proj.row(b, 0, h), a.k_proj.stride_n, a.k_proj.stride_d, a.P,
                  MAP_COLUMNS, threadIdx.x, MMA_THREADS);
  load_rows<T, D>(values, a.v_proj.row(b, 0, h), a.v_proj.stride_n, a.v_proj.stride_d, a.P,
                  MAP_COLUMNS, threadIdx.x, MMA_THREADS);
  for (int d = threadIdx.x; d < D; d += blockDim.x) scale[d] = factor / a.q_norm[head * D + d];
  const float multiplier = a.threshold ? float(dropout_scale(a.threshold)) : 1.f;
  const int64_t seed = a.threshold ? *a.seed : 0;
  float dkeys[D / 8][4] = {}, dvalues[D / 8][4] = {};
  for (int64_t start = first; start < stop; start += TILE_ROWS) {
    load_rows<T, D>(tile, a.q.row(b, start, h), a.q.stride_n, a.q.stride_d, stop - start, TILE_ROWS,
                    threadIdx.x, MMA_THREADS);
    load_rows<T, D>(gradients, dout.row(b, start, h), dout.stride_n, dout.stride_d, stop - start,
                    TILE_ROWS, threadIdx.x, MMA_THREADS);
    __syncthreads();
    const int64_t n = start + warp * WARP_ROWS + g;
    const T *own_rows = tile + warp * WARP_ROWS * ROW_STRIDE<D>;
    float weights[MAP_GROUPS][4], dlogits[MAP_GROUPS][4], total[2];
    multiply_transposed<T, D>(
        weights, a.normalize ? row_factor<T, D>(own_rows, scale) : row_factor<T, D>(own_rows),
        keys);
    exp2_rows(weights, total, a.P, a.normalize ? 1.f : factor);
    multiply_transposed<T, D>(
        dlogits, row_factor<T, D>(gradients + warp * WARP_ROWS * ROW_STRIDE<D>), values);
    const uint32_t kept = a.threshold ? kept_bits(seed, head * a.N + n, a.threshold) : 0xFFFFFFFF;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Divided once: an exact division is ten instructions.
      const float inverse = 1.f / total[r];
      float along = 0;
#pragma unroll
      for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          weights[j][i] *= inverse;
          dlogits[j][i] = kept >> (4 * j + i) & 1 ? dlogits[j][i] * multiplier : 0.f;
          along += weights[j][i] * dlogits[j][i];
        }
      along = warp_sum(along, 4);
#pragma unroll
      for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          dlogits[j][i] = weights[j][i] * (dlogits[j][i] - along);
          weights[j][i] = kept >> (4 * j + i) & 1 ? weights[j][i] * multiplier : 0.f;
        }
    }
    store_map(maps, weights);
    float result[D / 8][4];
    multiply_map<T, D>(result, dlogits, keys);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (n + 8 * r >= stop) continue;
      T *row = dq.row(b, n + 8 * r, h);
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        const int d = 8 * c + 2 * t;
        store_pair(row, dq.stride_d, d, result[c][2 * r] * scale[d] * float(1 / LOG2_E),
                   result[c][2 * r + 1] * scale[d + 1] * float(1 / LOG2_E));
      }
    }
    __syncthreads();
    add_products<T, D>(dvalues, maps, gradients);
    __syncthreads();
    store_map(maps, dlogits);
    __syncthreads();
    add_products<T, D>(dkeys, maps, tile);
    __syncthreads();
  }
  sums += (head * gridDim.x + index) * 2 * a.P * D;
#pragma unroll
  for (int c = 0; c < D / 8; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int p = warp * 16 + g + i / 2 * 8, d = 8 * c + 2 * t + i % 2;
      if (p >= a.P) continue;
      sums[p * D + d] = dkeys[c][i];
      sums[(a.P + p) * D + d] = dvalues[c][i];
    }
}

} // namespace epa::cuda
