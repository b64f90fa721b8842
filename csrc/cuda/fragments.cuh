// Pieces of kernels on tensor cores, T __nv_bfloat16, __half or float: a warp owns 16 rows of
// tokens, and of their map up to 64 columns. Lanes hold what ptx.h says: g = lane / 4, t = lane %
// 4.
//
//   16 bits  a word of a factor is the numbers 2t, 2t + 1 of its 8
//   float    a word is one number: 2t stands where ptx.h has t, 2t + 1 where it has t + 4. The
//            order of what is summed is free, and so accumulators are factors here, too
//
// Rows in shared memory are padded by 8 numbers, so that the words of 8 rows, of float the pairs of
// words of 4, lie in different banks; columns of float, which no instruction transposes, meet in
// two.
#pragma once
#include "heads.cuh"
#include "ptx.h"

namespace epa::cuda {

constexpr int MMA_WARPS = 4, MMA_THREADS = 32 * MMA_WARPS;
constexpr int WARP_ROWS = 16, TILE_ROWS = MMA_WARPS * WARP_ROWS; // tokens of a warp, of a block
constexpr int MAP_COLUMNS = 64, MAP_GROUPS = MAP_COLUMNS / 8;    // projected tokens, groups of 8
// Elements from row to row in shared memory: of the map, and of D channels.
constexpr int MAP_STRIDE = MAP_COLUMNS + 8;
template <int D> constexpr int ROW_STRIDE = D == 8 ? 8 : D + 8;

static_assert(MMA_WARPS * WARP_ROWS == MAP_COLUMNS, "backward, each warp owns 16 columns");

template <class T> using Word = std::conditional_t<std::is_same_v<T, float>, float, uint32_t>;
template <class T> constexpr int DEPTH = sizeof(T) == 2 ? 16 : 8; // of a product

// c += a b nearly as in float32: of each factor the TF32 number and what is left of it; the product
// of what is left is below float32. Tensor cores truncate sums where float32 rounds them, so
// theirs start from zero, and c takes them in float32.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  float high_a[4], low_a[4], high_b[2], low_b[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    high_a[i] = round_tf32(a[i]);
    low_a[i] = round_tf32(a[i] - high_a[i]);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    high_b[i] = round_tf32(b[i]);
    low_b[i] = round_tf32(b[i] - high_b[i]);
  }
  float part[4] = {};
  mma_tf32(part, low_a, high_b);
  mma_tf32(part, high_a, low_b);
  mma_tf32(part, high_a, high_b);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += part[i];
}

// A warp's rows of tokens as the first factor of products over D.
template <class T, int D> struct RowFactor {
  static constexpr int STEPS = D < DEPTH<T> ? 1 : D / DEPTH<T>, WORDS = D < DEPTH<T> ? 2 : 4;
  Word<T> word[STEPS][WORDS];
};

// Where word i of a pair of a lane's words begins, of the numbers that are summed over.
template <class T> __device__ __forceinline__ int word_offset(int i) {
  return 2 * (threadIdx.x % 4) + (sizeof(T) == 2 ? 8 : 1) * i;
}

template <class T> __device__ __forceinline__ Word<T> word_at(const T *numbers) {
  return *reinterpret_cast<const Word<T> *>(numbers);
}

// Two neighbours in memory, aligned as a pair.
template <class T> __device__ __forceinline__ void put_pair(T *to, float low, float high) {
  if constexpr (std::is_same_v<T, float>)
    *reinterpret_cast<float2 *>(to) = {low, high};
  else
    *reinterpret_cast<uint32_t *>(to) = pack<T>(low, high);
}

// Word i of step `step` of accumulators, rounded to T, as a factor of products over their columns.
template <class T, int GROUPS>
__device__ __forceinline__ Word<T> packed_word(const float (&rows)[GROUPS][4], int step, int i) {
  if constexpr (std::is_same_v<T, float>) {
    return rows[step][i % 2 * 2 + i / 2];
  } else {
    const float (&group)[4] = rows[2 * step + i / 2];
    return pack<T>(group[i % 2 * 2], group[i % 2 * 2 + 1]);
  }
}

// Rows of a matrix in shared memory, as many as a product is deep, and 8 columns: a second factor.
template <class T>
__device__ __forceinline__ void load_right(Word<T> (&result)[2], const T *matrix, int stride) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      result[i] = matrix[word_offset<T>(i) * stride + threadIdx.x % 32 / 4];
  } else {
    load_transposed(result, matrix + threadIdx.x % 16 * stride);
  }
}

// The same of 16 columns, transposed: a first factor.
template <class T>
__device__ __forceinline__ void load_left(Word<T> (&result)[4], const T *matrix, int stride) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      result[i] = matrix[word_offset<T>(i / 2) * stride + lane / 4 + i % 2 * 8];
  } else {
    load_transposed(result, matrix + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
  }
}

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
  if (stride_d == 1 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) {
    put_pair(to, low, high);
  } else {
    to[0] = narrow<T>(low);
    to[stride_d] = narrow<T>(high);
  }
}

template <class T, int D> __device__ __forceinline__ RowFactor<T, D> row_factor(const T *rows) {
  const int g = threadIdx.x % 32 / 4;
  RowFactor<T, D> result;
#pragma unroll
  for (int step = 0; step < RowFactor<T, D>::STEPS; ++step)
#pragma unroll
    for (int i = 0; i < RowFactor<T, D>::WORDS; ++i)
      result.word[step][i] = word_at(rows + (g + 8 * (i % 2)) * ROW_STRIDE<D> + DEPTH<T> * step +
                                     word_offset<T>(i / 2));
  return result;
}

// The same of rows whose channels are multiplied by scale (D), rounded to T.
template <class T, int D>
__device__ __forceinline__ RowFactor<T, D> row_factor(const T *rows, const float *scale) {
  const int g = threadIdx.x % 32 / 4;
  RowFactor<T, D> result;
#pragma unroll
  for (int step = 0; step < RowFactor<T, D>::STEPS; ++step)
#pragma unroll
    for (int i = 0; i < RowFactor<T, D>::WORDS; ++i) {
      const int d = DEPTH<T> * step + word_offset<T>(i / 2);
      const T *at = rows + (g + 8 * (i % 2)) * ROW_STRIDE<D> + d;
      if constexpr (std::is_same_v<T, float>)
        result.word[step][i] = *at * scale[d];
      else
        result.word[step][i] = pack<T>(widen(at[0]) * scale[d], widen(at[1]) * scale[d + 1]);
    }
  return result;
}

// result (16, 8 GROUPS) += rows matrix^T, matrix (8 GROUPS, D)
template <class T, int D, int GROUPS>
__device__ __forceinline__ void add_transposed(float (&result)[GROUPS][4],
                                               const RowFactor<T, D> &rows, const T *matrix) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int j = 0; j < GROUPS; ++j)
#pragma unroll
    for (int step = 0; step < RowFactor<T, D>::STEPS; ++step) {
      Word<T> factor[RowFactor<T, D>::WORDS / 2];
#pragma unroll
      for (int i = 0; i < RowFactor<T, D>::WORDS / 2; ++i)
        factor[i] =
            word_at(matrix + (8 * j + g) * ROW_STRIDE<D> + DEPTH<T> * step + word_offset<T>(i));
      mma<T>(result[j], rows.word[step], factor);
    }
}

template <int GROUPS> __device__ __forceinline__ void set_zero(float (&result)[GROUPS][4]) {
#pragma unroll
  for (int j = 0; j < GROUPS; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) result[j][i] = 0;
}

// map (16, 64) = rows matrix^T, matrix (64, D)
template <class T, int D>
__device__ __forceinline__ void multiply_transposed(float (&map)[MAP_GROUPS][4],
                                                    const RowFactor<T, D> &rows, const T *matrix) {
  set_zero(map);
  add_transposed<T, D>(map, rows, matrix);
}

// result (16, D) = map (16, 64) matrix (64, D), the map rounded to T
template <class T, int D>
__device__ __forceinline__ void multiply_map(float (&result)[D / 8][4],
                                             const float (&map)[MAP_GROUPS][4], const T *matrix) {
  set_zero(result);
#pragma unroll
  for (int k = 0; k < MAP_COLUMNS / DEPTH<T>; ++k) {
    Word<T> factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) factor[i] = packed_word<T>(map, k, i);
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      Word<T> other[2];
      load_right(other, matrix + DEPTH<T> * k * ROW_STRIDE<D> + 8 * c, ROW_STRIDE<D>);
      mma<T>(result[c], factor, other);
    }
  }
}

// sum (16, D) += map^T rows over the tile's tokens; of the map the columns of this warp.
template <class T, int D>
__device__ __forceinline__ void add_products(float (&sum)[D / 8][4], const T *map, const T *rows) {
  const int p = threadIdx.x / 32 % MMA_WARPS * 16;
  // Of float in part: loads ahead of so many products would spill.
#pragma unroll 4
  for (int k = 0; k < TILE_ROWS / DEPTH<T>; ++k) {
    Word<T> factor[4];
    load_left(factor, map + DEPTH<T> * k * MAP_STRIDE + p, MAP_STRIDE);
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      Word<T> other[2];
      load_right(other, rows + DEPTH<T> * k * ROW_STRIDE<D> + 8 * c, ROW_STRIDE<D>);
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
      put_pair(to + (row + 8 * r) * MAP_STRIDE + 8 * j + 2 * t, map[j][2 * r], map[j][2 * r + 1]);
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

// Bit 4 j + 2 r + i: whether dropout keeps column 8 j + 2 t + i of row + 8 r. A counter has the 8
// columns of a group, of which a lane needs two: each lane of four makes every fourth group's
// counter and hands the others their columns. Every lane of the warp must come here.
__device__ __forceinline__ uint32_t kept_bits(int64_t seed, int64_t row, uint32_t threshold) {
  const int t = threadIdx.x % 4;
  uint32_t bits = 0;
  // Not unrolled: counters at once spill.
#pragma unroll 1
  for (int first = 0; first < MAP_GROUPS; first += 4)
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      uint32_t words[COLUMNS_PER_COUNTER / 2];
      philox_words(seed, row + 8 * r, first + t, SPATIAL_MAP, words);
#pragma unroll
      for (int other = 0; other < 4; ++other) {
        // Selected, not indexed: an index that is no constant puts an array into memory.
        uint32_t columns = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i == (t ^ other)) columns = words[i];
        columns = __shfl_xor_sync(0xFFFFFFFF, columns, other);
        const uint32_t low = columns & 0xFFFF, high = columns >> 16;
        bits |= (uint32_t(low >= threshold) | uint32_t(high >= threshold) << 1)
                << (4 * (first + (t ^ other)) + 2 * r);
      }
    }
  return bits;
}

// From exponentials, their sums and gradients of the map to the map with dropout and dlogits.
__device__ __forceinline__ void softmax_backward(float (&weights)[MAP_GROUPS][4],
                                                 float (&dlogits)[MAP_GROUPS][4],
                                                 const float (&total)[2], uint32_t kept,
                                                 float multiplier) {
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
}

// What brings a number to 2^13 or more, below 2^14: float16 has all digits there.
__device__ __forceinline__ float float16_scale(float value) {
  int exponent;
  frexpf(value, &exponent);
  return ldexpf(1.f, 14 - (exponent > -100 ? exponent : -100));
}

} // namespace epa::cuda
