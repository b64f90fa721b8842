// The second pass over the tokens on tensor cores: bfloat16 and float16, D in {8, 16, 32, 64}, P up to
// 64, C a multiple of 32, the official layout of the kinds with output projections.
//
//   A block has a chunk of tokens of a head, or of the channel branch for some of its output
//   channels; its warps have 16 tokens each of a tile of 64. x comes in blocks of 32 channels.
//   q goes from accumulators to a factor of the logits, these to a factor of out_s: registers only.
//   out_s lies in shared memory with its channels as rows, as the official layout has it: C tokens
//   of it are whole rows, which are projected at once; where C does not divide N, it is stored.
#pragma once
#include "fragments.cuh"
#include "paired.cuh"

namespace epa::cuda {

constexpr int CHANNEL_BLOCK = 32, CHANNEL_STRIDE = ROW_STRIDE<CHANNEL_BLOCK>;
constexpr int CHANNEL_OUTPUTS = 64; // of a block of the channel branch

struct MmaTiles {
  bool has_rows;    // C divides N: whole rows of out_s' are projected at once
  bool is_resident; // the weights of all channels fit in shared memory, else 32 at a time
  int span;         // tokens whose out_s lies in shared memory: C, at least a tile
  int64_t chunk;    // tokens of a block, a multiple of span
};

// An accumulator of (16, D), rounded to T, as a factor of products over D.
template <class T, int D>
__device__ __forceinline__ RowFactor<D> packed(const float (&rows)[D / 8][4]) {
  RowFactor<D> result;
#pragma unroll
  for (int step = 0; step < RowFactor<D>::STEPS; ++step)
#pragma unroll
    for (int i = 0; i < RowFactor<D>::WORDS; ++i) {
      const float(&group)[4] = rows[2 * step + i / 2];
      result.word[step][i] = pack<T>(group[i % 2 * 2], group[i % 2 * 2 + 1]);
    }
  return result;
}

// matrix (rows, D) of sums to shared memory, rounded to T, zeros from row `inside` on.
template <class T, int D>
__device__ __forceinline__ void load_sums(T *to, const float *from, int inside, int rows) {
  for (int i = threadIdx.x; i < rows * D; i += MMA_THREADS)
    to[i / D * ROW_STRIDE<D> + i % D] = narrow<T>(i / D < inside ? from[i] : 0.f);
}

// Channels of x, `first` to first + 31, of a warp's 16 tokens.
template <class T>
__device__ __forceinline__ void load_x(const Paired<T> &a, T *to, int64_t b, int64_t n,
                                       int64_t stop, int first) {
  load_rows<T, CHANNEL_BLOCK>(to, &a.x.at(b, n, first), a.x.stride_n, a.x.stride_c, stop - n,
                              WARP_ROWS, threadIdx.x % 32, 32);
}

// A span of out_s, outs (D, span + 8), projected: y_s of D span / C rows.
template <class T, int D>
__device__ __forceinline__ void project_rows(const Paired<T> &a, int64_t b, int h, int64_t n,
                                             int span, const T *outs, T *y) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, C = a.C;
  const int rows = D * (span / C), groups = a.O / 8, stride = span + 8;
  const int64_t rows_of_channel = a.N / C;
  for (int task = threadIdx.x / 32; task < (rows + 15) / 16 * groups; task += MMA_WARPS) {
    const int first_row = task / groups * 16, first = task % groups * 8;
    // Row d of part j of the span, which C tokens make up.
    const T *row[2];
    for (int i = 0; i < 2; ++i) {
      const int r = first_row + g + 8 * i < rows ? first_row + g + 8 * i : 0;
      row[i] = outs + r % D * stride + r / D * C + 2 * t;
    }
    float sum[4] = {};
#pragma unroll 2
    for (int k = 0; k < C; k += 16) {
      const uint32_t factor[4] = {word_at(row[0] + k), word_at(row[1] + k), word_at(row[0] + k + 8),
                                  word_at(row[1] + k + 8)};
      const int64_t at = int64_t(first + g) * C + k + 2 * t;
      const uint32_t other[2] = {
          pack<T>(a.out_proj_weight[at], a.out_proj_weight[at + 1]),
          pack<T>(a.out_proj_weight[at + 8], a.out_proj_weight[at + 9])};
      mma<T>(sum, factor, other);
    }
    const int o = first + 2 * t;
    const float low = a.out_proj_bias ? a.out_proj_bias[o] : 0.f;
    const float high = a.out_proj_bias ? a.out_proj_bias[o + 1] : 0.f;
    for (int i = 0; i < 2; ++i) {
      const int r = first_row + g + 8 * i;
      if (r >= rows || n + r / D * C >= a.N) continue;
      const int64_t number = (int64_t(r % D) * a.H + h) * rows_of_channel + n / C + r / D;
      store_pair(y + (b * a.N + number) * C, 1, o, sum[2 * i] + low, sum[2 * i + 1] + high);
    }
  }
}

// A span of out_s to its place in the flat out_s'.
template <class T, int D>
__device__ __forceinline__ void store_span(const Paired<T> &a, int64_t b, int h, int64_t n,
                                           int span, const T *outs, T *out_s) {
  for (int i = threadIdx.x; i < D * span; i += MMA_THREADS) {
    const int d = i / span, token = i % span;
    if (n + token < a.N)
      out_s[b * a.N * a.C + a.flat(n + token, h, d)] = outs[d * (span + 8) + token];
  }
}

// y_c of a chunk, CHANNEL_OUTPUTS of its columns from `first` on.
template <class T>
__device__ void channel_outputs_mma(const Paired<T> &a, int64_t b, int64_t start, int64_t stop,
                                    int first, T *shared, T *y) {
  EPA_SHARED(float, constants, [CHANNEL_OUTPUTS]);
  constexpr int BLOCK = CHANNEL_OUTPUTS * CHANNEL_STRIDE;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, C = a.C;
  const int outputs = a.O - first < CHANNEL_OUTPUTS ? a.O - first : CHANNEL_OUTPUTS;
  T *tile = shared + threadIdx.x / 32 * WARP_ROWS * CHANNEL_STRIDE;
  T *matrix = shared + TILE_ROWS * CHANNEL_STRIDE;
  for (int i = threadIdx.x; i < CHANNEL_OUTPUTS * C; i += MMA_THREADS) {
    const int o = i / C, c = i % C;
    matrix[c / CHANNEL_BLOCK * BLOCK + o * CHANNEL_STRIDE + c % CHANNEL_BLOCK] =
        narrow<T>(o < outputs ? a.matrix(b, first + o, c) : 0.f);
  }
  for (int o = threadIdx.x; o < CHANNEL_OUTPUTS; o += MMA_THREADS)
    constants[o] = o < outputs ? a.constant(b, first + o) : 0.f;
  __syncthreads();
  for (int64_t n = start + threadIdx.x / 32 * WARP_ROWS; n < stop; n += TILE_ROWS) {
    float sum[CHANNEL_OUTPUTS / 8][4] = {};
    for (int k = 0; k < C; k += CHANNEL_BLOCK) {
      load_x(a, tile, b, n, stop, k);
      __syncwarp();
      add_transposed<T, CHANNEL_BLOCK>(sum, row_factor<T, CHANNEL_BLOCK>(tile),
                                       matrix + k / CHANNEL_BLOCK * BLOCK);
      __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (n + g + 8 * r >= stop) continue;
      T *row = y + (b * a.N + n + g + 8 * r) * C + a.O + first;
#pragma unroll
      for (int j = 0; j < CHANNEL_OUTPUTS / 8; ++j) {
        const int o = 8 * j + 2 * t;
        if (o < outputs)
          store_pair(row, 1, o, sum[j][2 * r] + constants[o], sum[j][2 * r + 1] + constants[o + 1]);
      }
    }
  }
}

// out_s is null where rows are projected here.
template <class T, int D>
__global__ void __launch_bounds__(MMA_THREADS, 4)
    paired_attention_mma_output_fwd_kernel(Paired<T> a, MmaTiles tiles, T *y, T *out_s) {
  EPA_DYNAMIC_SHARED(T, shared); // x, keys, values, out_s, weights; or x and the matrix
  EPA_SHARED(float, scale, [2 * D]);
  const int64_t b = blockIdx.z, start = blockIdx.x * tiles.chunk;
  const int64_t past = start + tiles.chunk, stop = past < a.N ? past : a.N;
  const int h = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4, C = a.C, stride = tiles.span + 8;
  if (h >= a.H)
    return channel_outputs_mma(a, b, start, stop, (h - a.H) * CHANNEL_OUTPUTS, shared, y);
  T *tile = shared + warp * WARP_ROWS * CHANNEL_STRIDE;
  T *keys = shared + TILE_ROWS * CHANNEL_STRIDE, *values = keys + MAP_COLUMNS * ROW_STRIDE<D>;
  T *outs = values + MAP_COLUMNS * ROW_STRIDE<D>, *weights = outs + D * stride;
  const int64_t projected = (b * a.H + h) * a.P * D;
  load_sums<T, D>(keys, a.k_proj + projected, a.P, MAP_COLUMNS);
  load_sums<T, D>(values, a.v_proj + projected, a.P, MAP_COLUMNS);
  // Channels `first` to first + channels - 1 of the weight of q.
  const auto load_weights = [&](int first, int channels) {
    for (int i = threadIdx.x; i < D * channels; i += MMA_THREADS) {
      const int d = i / channels, c = i % channels;
      weights[(c / CHANNEL_BLOCK * D + d) * CHANNEL_STRIDE + c % CHANNEL_BLOCK] =
          narrow<T>(a.weight(0, h * D + d, first + c));
    }
  };
  if (tiles.is_resident) load_weights(0, C);
  for (int d = threadIdx.x; d < D; d += MMA_THREADS) {
    scale[d] = a.scale[b * C + h * D + d] * float(LOG2_E);
    scale[D + d] = a.bias(0, h * D + d);
  }
  __syncthreads();
  const float multiplier = a.spatial_threshold ? float(dropout_scale(a.spatial_threshold)) : 1.f;
  const int64_t seed = a.spatial_threshold ? *a.seed : 0;
  for (int64_t first = start; first < stop; first += TILE_ROWS) {
    const int64_t n = first + warp * WARP_ROWS;
    float q[D / 8][4] = {};
    for (int k = 0; k < C; k += CHANNEL_BLOCK) {
      if (!tiles.is_resident) load_weights(k, CHANNEL_BLOCK);
      load_x(a, tile, b, n, stop, k);
      tiles.is_resident ? __syncwarp() : __syncthreads();
      add_transposed<T, CHANNEL_BLOCK>(
          q, row_factor<T, CHANNEL_BLOCK>(tile),
          weights + (tiles.is_resident ? k / CHANNEL_BLOCK : 0) * D * CHANNEL_STRIDE);
      tiles.is_resident ? __syncwarp() : __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = 8 * c + 2 * t + i % 2;
        q[c][i] = (q[c][i] + scale[D + d]) * scale[d];
      }
    float map[MAP_GROUPS][4], total[2], result[D / 8][4];
    multiply_transposed<T, D>(map, packed<T, D>(q), keys);
    exp2_rows(map, total, a.P, 1.f);
    if (a.spatial_threshold) {
      const uint32_t kept = kept_bits(seed, (b * a.H + h) * a.N + n + g, a.spatial_threshold);
#pragma unroll
      for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!(kept >> (4 * j + i) & 1)) map[j][i] = 0;
    }
    multiply_map<T, D>(result, map, values);
    const int at = int((first - start) % tiles.span) + warp * WARP_ROWS;
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        outs[(8 * c + 2 * t + i % 2) * stride + at + g + i / 2 * 8] =
            narrow<T>(result[c][i] * (multiplier / total[i / 2]));
    const int64_t end = first + TILE_ROWS;
    if ((end - start) % tiles.span && end < stop) continue;
    __syncthreads();
    const int64_t span_start = first - (first - start) % tiles.span;
    if (tiles.has_rows)
      project_rows<T, D>(a, b, h, span_start, tiles.span, outs, y);
    else
      store_span<T, D>(a, b, h, span_start, tiles.span, outs, out_s);
    __syncthreads();
  }
}

} // namespace epa::cuda
