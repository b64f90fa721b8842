// paired_summary.cuh on tensor cores.
//
//   fwd  for every layer; a block has 64 x 64 of the gram or of projected of a chunk. Centred
//        tokens are rounded to T; sums and means are not.
//   bwd  a block has a chunk of tokens, four warps with 16 of each tile of 64, and of dx 32 columns
//        of a sample, slice by slice of 32 rows of the matrices, of 64 for E. Or it has dE of a
//        projection, a warp 16 projected tokens. Blocks of a chunk are neighbours, so that E and x
//        come from L2.
//        dgram and dprojected are of the order of dy / N, below what float16 holds: there each
//        slice is scaled by a power of two, which changes no digit, and its product scaled back in
//        float32.
#pragma once
#include "paired_mma.cuh"

namespace epa::cuda {

// The first pass: of a chunk 64 x 64 of the gram or of projected, as summary_fwd of
// paired_summary.cuh. Centred tokens are rounded to T; sums and means are not.
template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_summary_fwd_mma_kernel(Paired<T> a) {
  constexpr int HALF = TILE_ROWS * CHANNEL_STRIDE;
  EPA_SHARED(T, left, [TILE_ROWS * MAP_STRIDE]); // tokens of the rows' channels; or E, (P, tokens)
  EPA_SHARED(T, right, [2 * HALF]);
  EPA_SHARED(float, deltas, [2 * MAP_COLUMNS]);
  const int64_t index = blockIdx.x, b = blockIdx.z, start = index * a.chunk;
  const int column_blocks = blocks_of_64(a.C), projected_blocks = blocks_of_64(a.P);
  const int block = blockIdx.y / column_blocks, first_column = blockIdx.y % column_blocks * 64;
  const bool is_gram = block < column_blocks;
  const int j = is_gram ? 0 : (block - column_blocks) / projected_blocks;
  const int first_row = (is_gram ? block : (block - column_blocks) % projected_blocks) * 64;
  const int rows = (is_gram ? a.C : a.P) - first_row, columns = a.C - first_column;
  const int64_t count = a.tokens_of(index);
  const auto tokens_of = [&](int first, int rest) {
    return TokenBlock<T>{&a.x.at(b, start, first), a.x.stride_n, a.x.stride_c,
                         rest < MAP_COLUMNS ? rest : MAP_COLUMNS, nullptr};
  };
  const auto left_at = [](int row, int c) { return row * MAP_STRIDE + c; };
  const auto right_at = [](int row, int c) {
    return c / CHANNEL_BLOCK * HALF + row * CHANNEL_STRIDE + c % CHANNEL_BLOCK;
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T *own_half = right + warp / MMA_WARPS * HALF;
  const int own_row = warp % MMA_WARPS * 16 + g;
  const int own_column = warp / MMA_WARPS * CHANNEL_BLOCK + 2 * t;
  // Of the first threads each has a channel: of the rows, then of the columns.
  const int side = threadIdx.x / MAP_COLUMNS, channel = threadIdx.x % MAP_COLUMNS;
  const bool has_channel = is_gram && side < 2 && channel < (side ? columns : rows);
  const float token =
      has_channel ? widen(a.x.at(b, start, (side ? first_column : first_row) + channel)) : 0.f;
  float sum[CHANNEL_BLOCK / 8][4] = {}, mean = 0;
  for (int64_t n = 0; n < count; n += TILE_ROWS) {
    const int inside = count - n < TILE_ROWS ? int(count - n) : TILE_ROWS;
    load_block(tokens_of(first_column, columns), n, inside, nullptr, right, right_at);
    if (is_gram) {
      load_block(tokens_of(first_row, rows), n, inside, nullptr, left, left_at);
    } else {
      for (int i = threadIdx.x; i < MAP_COLUMNS * TILE_ROWS; i += PAIRED_THREADS) {
        const int p = i / TILE_ROWS, row = i % TILE_ROWS;
        left[p * MAP_STRIDE + row] = narrow<T>(
            p < rows && row < inside ? a.projection[j].at(first_row + p, start + n + row) : 0.f);
      }
    }
    __syncthreads();
    if (is_gram) {
      const float share = float(inside) / float(n + inside);
      if (has_channel) {
        T *tile = side ? right + right_at(0, channel) : left + channel;
        const int stride = side ? CHANNEL_STRIDE : MAP_STRIDE;
        // Differences to one token are exact where tokens are nearly constant.
        float offset = 0;
        for (int i = 0; i < inside; ++i) offset += widen(tile[i * stride]) - token;
        offset /= inside;
        for (int i = 0; i < inside; ++i)
          tile[i * stride] = narrow<T>(widen(tile[i * stride]) - token - offset);
        deltas[threadIdx.x] = offset - mean;
        mean += share * (offset - mean);
      }
      __syncthreads();
      // Chan's formula: from the means of the tokens so far and of the tile to the joint one.
#pragma unroll
      for (int c = 0; c < CHANNEL_BLOCK / 8; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n)
            sum[c][i] += deltas[own_row + i / 2 * 8] * (share * float(n)) *
                         deltas[MAP_COLUMNS + own_column + 8 * c + i % 2];
      add_products<T, CHANNEL_BLOCK>(sum, left, own_half);
    } else {
      const RowFactor<T, TILE_ROWS> factor =
          row_factor<T, TILE_ROWS>(left + warp % MMA_WARPS * 16 * MAP_STRIDE);
#pragma unroll
      for (int k = 0; k < TILE_ROWS / DEPTH<T>; ++k)
#pragma unroll
        for (int c = 0; c < CHANNEL_BLOCK / 8; ++c) {
          Word<T> other[2];
          load_right(other, own_half + DEPTH<T> * k * CHANNEL_STRIDE + 8 * c, CHANNEL_STRIDE);
          mma<T>(sum[c], factor.word[k], other);
        }
    }
    __syncthreads();
  }
  const int64_t at = b * gridDim.x + index;
  float *to =
      is_gram ? a.chunk_grams + at * a.C * a.C : a.chunk_projected + (at * a.J + j) * a.P * a.C;
#pragma unroll
  for (int c = 0; c < CHANNEL_BLOCK / 8; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = own_row + i / 2 * 8, column = own_column + 8 * c + i % 2;
      if (row < rows && column < columns)
        to[int64_t(first_row + row) * a.C + first_column + column] = sum[c][i];
    }
  if (has_channel && side && block == 0)
    a.chunk_means[at * a.C + first_column + channel] = double(token) + double(mean);
}

// A slice is the rows of a matrix that one step multiplies, 32 columns of them. Elements of a slice
// of 32 rows in shared memory, and the most slices of a block.
constexpr int SLICE = CHANNEL_BLOCK * CHANNEL_STRIDE, MOST_SLICES = 32;
// Elements of a tile's tokens and, before them, of a projection.
constexpr int ROWS_TILE = TILE_ROWS * CHANNEL_STRIDE, PROJECTION_TILE = MAP_COLUMNS * MAP_STRIDE;

struct GradientTiles {
  int64_t chunk;                          // tokens of a block, a multiple of a tile
  int samples;                            // B
  bool has_all_matrices, has_all_samples; // of dx, of dE: all slices fit in shared memory
};

// at(row, column) of 32 columns to shared memory, multiplied by a power of two where T is float16;
// its inverse to *inverse. Every thread of the block must come here.
template <class T, int ROWS, class At>
__device__ __forceinline__ void load_slice(T *to, float *inverse, At at) {
  constexpr int COUNT = ROWS * CHANNEL_BLOCK / MMA_THREADS;
  const int column = threadIdx.x % CHANNEL_BLOCK, first = threadIdx.x / CHANNEL_BLOCK;
  float values[COUNT], scale = 1, largest = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] = at(first + i * MMA_WARPS, column);
  if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) largest = fmaxf(largest, fabsf(values[i]));
    scale = power_of_two(largest);
    if (threadIdx.x == 0) *inverse = 1 / scale;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    to[(first + i * MMA_WARPS) * CHANNEL_STRIDE + column] = narrow<T>(values[i] * scale);
}

// sum += what `add` adds to it, of a slice that load_slice has scaled.
template <class T, int GROUPS, class Add>
__device__ __forceinline__ void add_scaled(float (&sum)[GROUPS][4], const float *inverse, Add add) {
  if constexpr (std::is_same_v<T, __half>) {
    float part[GROUPS][4] = {};
    add(part);
#pragma unroll
    for (int j = 0; j < GROUPS; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[j][i] += *inverse * part[j][i];
  } else {
    add(sum);
  }
}

// sum (16, 32) += rows matrix, both of a slice
template <class T>
__device__ __forceinline__ void add_slice(float (&sum)[CHANNEL_BLOCK / 8][4],
                                          const RowFactor<T, CHANNEL_BLOCK> &rows,
                                          const T *matrix) {
#pragma unroll
  for (int step = 0; step < CHANNEL_BLOCK / DEPTH<T>; ++step)
#pragma unroll
    for (int c = 0; c < CHANNEL_BLOCK / 8; ++c) {
      Word<T> other[2];
      load_right(other, matrix + DEPTH<T> * step * CHANNEL_STRIDE + 8 * c, CHANNEL_STRIDE);
      mma<T>(sum[c], rows.word[step], other);
    }
}

// A tile's columns of a projection, from n on, to shared memory: (P, tokens), rounded to T, zeros
// outside.
template <class T>
__device__ __forceinline__ void load_projection(const Projection<T> &from, T *to, int P, int64_t n,
                                                int64_t inside) {
  constexpr int VECTOR = 16 / sizeof(T);
  const bool is_aligned = from.stride_n == 1 && from.stride_p % VECTOR == 0 &&
                          reinterpret_cast<uintptr_t>(from.weight.data) % 16 == 0;
  for (int i = threadIdx.x; i < MAP_COLUMNS * TILE_ROWS / VECTOR; i += MMA_THREADS) {
    const int p = i / (TILE_ROWS / VECTOR), row = i % (TILE_ROWS / VECTOR) * VECTOR;
    const int64_t at = from.offset(p, n + row);
    alignas(16) T values[VECTOR];
    if (is_aligned && p < P && row + VECTOR <= inside) {
      if (sizeof(T) == 2 && from.weight.is_wide) {
        const float4 *data =
            reinterpret_cast<const float4 *>(static_cast<const float *>(from.weight.data) + at);
#pragma unroll
        for (int i = 0; i < VECTOR / 4; ++i) {
          const float4 part = data[i];
          put_pair(values + 4 * i, part.x, part.y);
          put_pair(values + 4 * i + 2, part.z, part.w);
        }
      } else {
        *reinterpret_cast<uint4 *>(values) =
            *reinterpret_cast<const uint4 *>(static_cast<const T *>(from.weight.data) + at);
      }
    } else {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e)
        values[e] = narrow<T>(p < P && row + e < inside ? from.at(p, n + row + e) : 0.f);
    }
    *reinterpret_cast<uint4 *>(to + p * MAP_STRIDE + row) =
        *reinterpret_cast<const uint4 *>(values);
  }
}

// A warp's 16 rows of x in shared memory without their mean, rounded to T.
template <class T> __device__ __forceinline__ void subtract(T *rows, const float *mean) {
  constexpr int VECTOR = 16 / sizeof(T), VECTORS = CHANNEL_BLOCK / VECTOR;
  for (int i = threadIdx.x % 32; i < WARP_ROWS * VECTORS; i += 32) {
    const int c = i % VECTORS * VECTOR;
    uint4 *at = reinterpret_cast<uint4 *>(rows + i / VECTORS * CHANNEL_STRIDE + c);
    alignas(16) T values[VECTOR];
    *reinterpret_cast<uint4 *>(values) = *at;
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) values[e] = narrow<T>(widen(values[e]) - mean[c + e]);
    *at = *reinterpret_cast<const uint4 *>(values);
  }
}

// The slices of dx: of Wq, dgram, matrix, then two for each projection.
struct DxSlices {
  int of_x, of_dy, of_projection, count, first_dy;
  __host__ __device__ DxSlices(int C, int O, int J)
      : of_x(C / CHANNEL_BLOCK), of_dy(2 * of_x),
        // dy_c begins within a block of channels where C / 2 is no multiple of it.
        of_projection(of_dy + of_x - (C - O) / CHANNEL_BLOCK), count(of_projection + J),
        first_dy((C - O) / CHANNEL_BLOCK * CHANNEL_BLOCK) {}
  __host__ __device__ int offset(int slice) const {
    return (slice < of_projection ? slice : 2 * slice - of_projection) * SLICE;
  }
};

template <class T>
__device__ void token_gradients_mma(const Paired<T> &a, const PairedBackward<T> &g, int64_t b,
                                    int column, int64_t start, int64_t stop, bool is_resident,
                                    T *shared, float *inverses) {
  const int C = a.C, O = a.O, P = a.P, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const DxSlices slices(C, O, a.J);
  float *mean = reinterpret_cast<float *>(shared);
  T *projection = shared + C * (sizeof(float) / sizeof(T)),
    *tile = projection + PROJECTION_TILE + warp * WARP_ROWS * CHANNEL_STRIDE;
  T *matrices = projection + PROJECTION_TILE + ROWS_TILE;
  const auto load = [&](int slice, T *to) {
    float *inverse = inverses + slice;
    if (slice < slices.of_x) {
      load_slice<T, CHANNEL_BLOCK>(to, inverse, [&](int i, int c) {
        return a.weight(0, slice * CHANNEL_BLOCK + i, column + c);
      });
    } else if (slice < slices.of_dy) {
      const int first = (slice - slices.of_x) * CHANNEL_BLOCK;
      load_slice<T, CHANNEL_BLOCK>(
          to, inverse, [&](int i, int c) { return g.dgram[(b * C + first + i) * C + column + c]; });
    } else if (slice < slices.of_projection) {
      const int first = slices.first_dy - (C - O) + (slice - slices.of_dy) * CHANNEL_BLOCK;
      load_slice<T, CHANNEL_BLOCK>(to, inverse, [&](int i, int c) {
        return first + i < 0 ? 0.f : g.matrix[(b * O + first + i) * C + column + c];
      });
    } else {
      const int64_t first = (b * a.J + slice - slices.of_projection) * P;
      load_slice<T, MAP_COLUMNS>(to, inverse, [&](int p, int c) {
        return p < P ? g.dprojected[(first + p) * C + column + c] : 0.f;
      });
    }
  };
  for (int c = threadIdx.x; c < C; c += MMA_THREADS) mean[c] = float(a.mean[b * C + c]);
  for (int slice = 0; is_resident && slice < slices.count; ++slice)
    load(slice, matrices + slices.offset(slice));
  __syncthreads();
  for (int64_t first = start; first < stop; first += TILE_ROWS) {
    const int64_t n = first + warp * WARP_ROWS;
    float sum[CHANNEL_BLOCK / 8][4];
#pragma unroll
    for (int c = 0; c < CHANNEL_BLOCK / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[c][i] = g.dtoken[b * C + column + 8 * c + 2 * (lane % 4) + i % 2];
#pragma unroll 1
    for (int slice = 0; slice < slices.count; ++slice) {
      const T *matrix = matrices + (is_resident ? slices.offset(slice) : 0);
      if (!is_resident) load(slice, matrices);
      const bool is_own = is_resident && slice < slices.of_projection; // of this warp alone
      if (slice < slices.of_projection) {
        const bool is_x = slice >= slices.of_x && slice < slices.of_dy;
        const int k = (slice < slices.of_x ? slice : slice - (is_x ? slices.of_x : slices.of_dy)) *
                          CHANNEL_BLOCK +
                      (slice < slices.of_dy ? 0 : slices.first_dy);
        if (is_x) {
          load_x(a, tile, b, n, stop, k);
          __syncwarp();
          subtract(tile, mean + k);
        } else {
          const T *from = slice < slices.of_x ? g.dq : g.dy;
          load_rows<T, CHANNEL_BLOCK>(tile, from + (b * a.N + n) * C + k, C, 1, stop - n, WARP_ROWS,
                                      lane, 32);
        }
      } else {
        load_projection(a.projection[slice - slices.of_projection], projection, P, first,
                        stop - first);
      }
      is_own ? __syncwarp() : __syncthreads();
      add_scaled<T>(sum, inverses + slice, [&](auto &to) {
        if (slice < slices.of_projection)
          add_slice<T>(to, row_factor<T, CHANNEL_BLOCK>(tile), matrix);
        else
          add_products<T, CHANNEL_BLOCK>(to, projection, matrix);
      });
      is_own ? __syncwarp() : __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = n + lane / 4 + 8 * r;
      if (row >= stop) continue;
#pragma unroll
      for (int c = 0; c < CHANNEL_BLOCK / 8; ++c)
        store_pair(&g.dx.at(b, row, column), g.dx.stride_c, 8 * c + 2 * (lane % 4), sum[c][2 * r],
                   sum[c][2 * r + 1]);
    }
  }
}

template <class T>
__device__ void projection_gradients_mma(const Paired<T> &a, const PairedBackward<T> &g, int j,
                                         int samples, int64_t start, int64_t stop, bool is_resident,
                                         T *shared, float *inverses) {
  const int C = a.C, P = a.P, blocks = C / CHANNEL_BLOCK, count = samples * blocks;
  const int own = threadIdx.x / 32 * WARP_ROWS, group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  T *tile = shared, *gradients = tile + ROWS_TILE;
  const auto load = [&](int slice, T *to, float *inverse) {
    const int64_t first = (int64_t(slice / blocks) * a.J + j) * P;
    const int k = slice % blocks * CHANNEL_BLOCK;
    load_slice<T, MAP_COLUMNS>(to, inverse, [&](int p, int c) {
      return p < P ? g.dprojected[(first + p) * C + k + c] : 0.f;
    });
  };
  for (int slice = 0; is_resident && slice < count; ++slice)
    load(slice, gradients + 2 * slice * SLICE, inverses + slice);
  for (int64_t first = start; first < stop; first += TILE_ROWS) {
    float sum[MAP_GROUPS][4] = {};
#pragma unroll 1
    for (int slice = 0; slice < count; ++slice) {
      const int kept = is_resident ? slice : 0;
      if (!is_resident) load(slice, gradients, inverses);
      load_rows<T, CHANNEL_BLOCK>(
          tile, &a.x.at(slice / blocks, first, slice % blocks * CHANNEL_BLOCK), a.x.stride_n,
          a.x.stride_c, stop - first, TILE_ROWS, threadIdx.x, MMA_THREADS);
      __syncthreads();
      const RowFactor<T, CHANNEL_BLOCK> rows =
          row_factor<T, CHANNEL_BLOCK>(gradients + 2 * kept * SLICE + own * CHANNEL_STRIDE);
      add_scaled<T>(sum, inverses + kept,
                    [&](auto &to) { add_transposed<T, CHANNEL_BLOCK>(to, rows, tile); });
      __syncthreads();
    }
    const Projection<T> &to = g.dprojection[j];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int p = own + group + 8 * r;
      if (p >= P) continue;
      const float drow = a.qkvv_bias ? g.drows[j * P + p] : 0.f;
#pragma unroll
      for (int c = 0; c < MAP_GROUPS; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t n = first + 8 * c + 2 * t + i;
          if (n < stop) to.weight.store(to.offset(p, n), sum[c][2 * r + i] + drow);
        }
    }
  }
}

// Of each chunk: blocks of 32 columns of dx by sample, then a block of each projection.
template <class T>
__global__ void __launch_bounds__(MMA_THREADS, sizeof(T) == 2 ? 6 : 2)
    paired_attention_summary_bwd_mma_kernel(Paired<T> a, PairedBackward<T> g, GradientTiles tiles) {
  // The means, a projection's tile, rows of tokens, matrices; or rows of tokens and gradients.
  EPA_DYNAMIC_SHARED(T, shared);
  EPA_SHARED(float, inverses, [MOST_SLICES]);
  const int blocks = a.C / CHANNEL_BLOCK, of_dx = tiles.samples * blocks, jobs = of_dx + a.J;
  const int job = blockIdx.x % jobs;
  const int64_t start = blockIdx.x / jobs * tiles.chunk, past = start + tiles.chunk;
  const int64_t stop = past < a.N ? past : a.N;
  if (job < of_dx)
    token_gradients_mma(a, g, job / blocks, job % blocks * CHANNEL_BLOCK, start, stop,
                        tiles.has_all_matrices, shared, inverses);
  else
    projection_gradients_mma(a, g, job - of_dx, tiles.samples, start, stop, tiles.has_all_samples,
                             shared, inverses);
}

} // namespace epa::cuda
