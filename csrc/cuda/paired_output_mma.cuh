// paired_output.cuh on tensor cores; forward the official layout, of kind sum where whole rows are
// projected at once (MmaTiles).
//
//   A block has a chunk of tokens of a head, or of the channel branch for some of its output
//   channels. q goes from accumulators to a factor of the logits, these to a factor of out_s:
//   registers only. out_s lies in shared memory with its channels as rows, as the official layout
//   has it: C tokens of it are whole rows, which are projected at once; where C does not divide N,
//   it is stored. Backward, a warp owns 16 projected tokens of dkeys and dv_proj, as in
//   spatial_mma.cuh.
#pragma once
#include "paired_mma.cuh"

namespace epa::cuda {

constexpr int CHANNEL_OUTPUTS = 64; // columns of y_c of a block

struct MmaTiles {
  // Whole rows of out_s' are projected at once: C divides N, and one of C and 64 the other.
  bool has_rows;
  bool is_resident; // the weights of all channels fit in shared memory, else 32 at a time
  int span;         // tokens whose out_s lies in shared memory: C, at least a tile
  int64_t chunk;    // tokens of a block, a multiple of span
};

// An accumulator of (16, D), rounded to T, as a factor of products over D.
template <class T, int D>
__device__ __forceinline__ RowFactor<T, D> packed(const float (&rows)[D / 8][4]) {
  RowFactor<T, D> result;
#pragma unroll
  for (int step = 0; step < RowFactor<T, D>::STEPS; ++step)
#pragma unroll
    for (int i = 0; i < RowFactor<T, D>::WORDS; ++i)
      result.word[step][i] = packed_word<T>(rows, step, i);
  return result;
}

// matrix (rows, D) of sums to shared memory, rounded to T, zeros from row `inside` on.
template <class T, int D>
__device__ __forceinline__ void load_sums(T *to, const float *from, int inside, int rows) {
  for (int i = threadIdx.x; i < rows * D; i += MMA_THREADS)
    to[i / D * ROW_STRIDE<D> + i % D] = narrow<T>(i / D < inside ? from[i] : 0.f);
}

// `channels` channels from `first` on of a head's weight of q, in blocks of (D, 32).
template <class T, int D>
__device__ __forceinline__ void load_weights(const Paired<T> &a, T *to, int h, int first,
                                             int channels) {
  for (int i = threadIdx.x; i < D * channels; i += MMA_THREADS) {
    const int d = i / channels, c = i % channels;
    to[(c / CHANNEL_BLOCK * D + d) * CHANNEL_STRIDE + c % CHANNEL_BLOCK] =
        narrow<T>(a.weight(0, h * D + d, first + c));
  }
}

// Two neighbours of a row of global memory as a word, or one of float.
template <class T> __device__ __forceinline__ Word<T> row_word(const T *at, int64_t stride) {
  if constexpr (std::is_same_v<T, float>) {
    return *at;
  } else {
    if (stride == 1 && reinterpret_cast<uintptr_t>(at) % 4 == 0) return word_at(at);
    return pack<T>(widen(at[0]), widen(at[stride]));
  }
}

// Of a span of out_s, outs (D, span + 8), the D span / C rows of out_s' that it makes up, projected
// to y_s; or of kind sum, with the channel branch of the tokens that have their numbers, y.
template <class T, int D>
__device__ __forceinline__ void project_rows(const Paired<T> &a, int64_t b, int h, int64_t n,
                                             int span, const T *outs, T *y) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, C = a.C;
  const int rows = D * (span / C), groups = a.O / 8, stride = span + 8;
  const int64_t rows_of_channel = a.N / C;
  const auto weight = [&](int64_t at) {
    return a.is_sum ? a.value_matrix[b * C * C + at] : a.out_proj_weight[at];
  };
  for (int task = threadIdx.x / 32; task < (rows + 15) / 16 * groups; task += MMA_WARPS) {
    const int first_row = task / groups * 16, first = task % groups * 8;
    __syncwarp(); // not all lanes have stored
    // Row d of part j of the span, which C tokens make up.
    const T *row[2];
    int64_t number[2];
    bool is_inside[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int r = first_row + g + 8 * i;
      is_inside[i] = r < rows && n + r / D * C < a.N;
      if (!is_inside[i]) r = 0;
      row[i] = outs + r % D * stride + r / D * C;
      number[i] = (int64_t(r % D) * a.H + h) * rows_of_channel + n / C + r / D;
    }
    float sum[4] = {};
#pragma unroll 2
    for (int k = 0; k < C; k += DEPTH<T>) {
      Word<T> factor[4], other[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = k + word_offset<T>(i / 2);
        factor[i] = a.is_sum ? row_word(&a.x.at(b, number[i % 2], c), a.x.stride_c)
                             : word_at(row[i % 2] + c);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = int64_t(first + g) * C + k + word_offset<T>(i);
        if constexpr (std::is_same_v<T, float>)
          other[i] = weight(at);
        else
          other[i] = pack<T>(weight(at), weight(at + 1));
      }
      mma<T>(sum, factor, other);
    }
    const int o = first + 2 * t;
    const auto constant = [&](int column) {
      if (a.is_sum) return a.value_constant[b * C + column];
      return a.out_proj_bias ? a.out_proj_bias[column] : 0.f;
    };
    const float low = constant(o), high = constant(o + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!is_inside[i]) continue;
      float own[2] = {};
      if (a.is_sum) own[0] = widen(row[i][o]), own[1] = widen(row[i][o + 1]);
      store_pair(y + (b * a.N + number[i]) * C, 1, o, sum[2 * i] + low + own[0],
                 sum[2 * i + 1] + high + own[1]);
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
    paired_attention_output_fwd_mma_kernel(Paired<T> a, MmaTiles tiles, T *y, T *out_s) {
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
  if (tiles.is_resident) load_weights<T, D>(a, weights, h, 0, C);
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
      if (!tiles.is_resident) load_weights<T, D>(a, weights, h, k, CHANNEL_BLOCK);
      load_x(a, tile, b, n, stop, k);
      tiles.is_resident ? __syncwarp() : __syncthreads();
      add_transposed<T, CHANNEL_BLOCK>(q, row_factor<T, CHANNEL_BLOCK>(tile),
                                       weights + (tiles.is_resident ? k / CHANNEL_BLOCK : 0) * D *
                                                     CHANNEL_STRIDE);
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

// dmatrix and dconstant of a chunk, a block of 64 x 64.
template <class T>
__device__ void channel_sums_mma(const Paired<T> &a, const PairedBackward<T> &g, int64_t b, int job,
                                 T *shared) {
  const int columns = blocks_of_64(a.C), row = job / columns * 64, column = job % columns * 64;
  const int64_t start = blockIdx.x * g.chunk, rest = a.N - start;
  const int64_t at = (b * g.chunks + blockIdx.x) * a.O + row;
  token_products<T, MMA_THREADS>(
      token_block(g.dy, b * a.N + start, a.C, a.C - a.O + row, a.C),
      centred_block(a, b, start, column), rest < g.chunk ? rest : g.chunk, shared,
      g.matrix_sums + at * a.C + column, a.C, column ? nullptr : g.constant_sums + at);
}

// dq, out_s and sums of a chunk of a head; or a block of the channel branch's.
template <class T, int D>
__global__ void __launch_bounds__(MMA_THREADS, D == 64 || sizeof(T) == 4 ? 2 : 3)
    paired_attention_output_bwd_mma_kernel(Paired<T> a, PairedBackward<T> g, bool is_resident) {
  constexpr int ROWS = TILE_ROWS * ROW_STRIDE<D>;
  constexpr int X_TILE = TILE_ROWS * CHANNEL_STRIDE, MAP_TILE = TILE_ROWS * MAP_STRIDE;
  constexpr int WEIGHTS = D * CHANNEL_STRIDE; // of a block of channels
  // keys, values, gradients of out_s, q without its mean; the map, and in the same place x and
  // weights of a block of channels; weights of all channels if resident
  EPA_DYNAMIC_SHARED(T, shared);
  EPA_SHARED(float, scale, [2 * D]);
  const int64_t index = blockIdx.x, b = blockIdx.z, start = index * g.chunk;
  const int64_t past = start + g.chunk, stop = past < a.N ? past : a.N;
  const int h = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, t = lane % 4, C = a.C, P = a.P;
  if (h >= a.H) return channel_sums_mma(a, g, b, h - a.H, shared);
  T *keys = shared, *values = keys + ROWS, *gradients = values + ROWS, *queries = gradients + ROWS;
  T *maps = queries + ROWS, *tile = maps + warp * WARP_ROWS * CHANNEL_STRIDE;
  T *weights = maps + (is_resident ? MAP_TILE : X_TILE);
  const int64_t projected = (b * a.H + h) * P * D, head = b * C + h * D;
  load_sums<T, D>(keys, a.k_proj + projected, P, MAP_COLUMNS);
  load_sums<T, D>(values, a.v_proj + projected, P, MAP_COLUMNS);
  if (is_resident) load_weights<T, D>(a, weights, h, 0, C);
  for (int d = threadIdx.x; d < D; d += MMA_THREADS) {
    scale[d] = a.scale[head + d];
    scale[D + d] = a.q_mean[head + d];
  }
  __syncthreads();
  const float multiplier = a.spatial_threshold ? float(dropout_scale(a.spatial_threshold)) : 1.f;
  const int64_t seed = a.spatial_threshold ? *a.seed : 0;
  float dkeys[D / 8][4] = {}, dvalues[D / 8][4] = {}, totals[MAP_GROUPS][2] = {};
  for (int64_t first = start; first < stop; first += TILE_ROWS) {
    const int64_t n = first + warp * WARP_ROWS + group;
    // Neighbouring threads have what lies next to each other in the flat out_s'.
    for (int i = threadIdx.x; i < TILE_ROWS * D; i += MMA_THREADS) {
      const int d = a.is_official ? i / TILE_ROWS : i % D;
      const int row = a.is_official ? i % TILE_ROWS : i / D;
      gradients[row * ROW_STRIDE<D> + d] =
          first + row < stop ? g.dout[b * a.N * C + a.flat(first + row, h, d)] : narrow<T>(0.f);
    }
    float q[D / 8][4] = {};
    for (int k = 0; k < C; k += CHANNEL_BLOCK) {
      if (!is_resident) load_weights<T, D>(a, weights, h, k, CHANNEL_BLOCK);
      load_x(a, tile, b, first + warp * WARP_ROWS, stop, k);
      is_resident ? __syncwarp() : __syncthreads();
      // Each lane takes the mean off what it loaded with the others, then all read it.
      for (int i = lane; i < WARP_ROWS * CHANNEL_BLOCK; i += 32) {
        T &value = tile[i / CHANNEL_BLOCK * CHANNEL_STRIDE + i % CHANNEL_BLOCK];
        value = narrow<T>(widen(value) - float(a.mean[b * C + k + i % CHANNEL_BLOCK]));
      }
      __syncwarp();
      add_transposed<T, CHANNEL_BLOCK>(q, row_factor<T, CHANNEL_BLOCK>(tile),
                                       weights + (is_resident ? k / CHANNEL_BLOCK : 0) * WEIGHTS);
      is_resident ? __syncwarp() : __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      const int d = 8 * c + 2 * t;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        put_pair(queries + (warp * WARP_ROWS + group + 8 * r) * ROW_STRIDE<D> + d, q[c][2 * r],
                 q[c][2 * r + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        q[c][i] = (q[c][i] + scale[D + d + i % 2]) * (scale[d + i % 2] * float(LOG2_E));
    }
    __syncthreads();
    float map[MAP_GROUPS][4], dlogits[MAP_GROUPS][4], total[2], result[D / 8][4];
    multiply_transposed<T, D>(map, packed<T, D>(q), keys);
    exp2_rows(map, total, P, 1.f);
    multiply_transposed<T, D>(
        dlogits, row_factor<T, D>(gradients + warp * WARP_ROWS * ROW_STRIDE<D>), values);
    const uint32_t kept = a.spatial_threshold
                              ? kept_bits(seed, (b * a.H + h) * a.N + n, a.spatial_threshold)
                              : 0xFFFFFFFF;
    softmax_backward(map, dlogits, total, kept, multiplier);
#pragma unroll
    for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) totals[j][i] += dlogits[j][i] + dlogits[j][2 + i];
    // Of the order of dy / P: float16 holds few digits of them as they are.
    float up = 1;
    if constexpr (std::is_same_v<T, __half>) {
      float largest = 0;
#pragma unroll
      for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(dlogits[j][i]));
      up = power_of_two(largest);
#pragma unroll
      for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) dlogits[j][i] *= up;
    }
    const float down = 1 / up;
    store_map(maps, map);
    if (!a.is_sum) {
      multiply_map<T, D>(result, map, values);
#pragma unroll
      for (int c = 0; c < D / 8; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n + i / 2 * 8 < stop)
            g.out_s[b * a.N * C + a.flat(n + i / 2 * 8, h, 8 * c + 2 * t + i % 2)] =
                narrow<T>(result[c][i]);
    }
    multiply_map<T, D>(result, dlogits, keys);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (n + 8 * r >= stop) continue;
      T *row = g.dq + (b * a.N + n + 8 * r) * C + h * D;
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        const int d = 8 * c + 2 * t;
        store_pair(row, 1, d, result[c][2 * r] * (scale[d] * down),
                   result[c][2 * r + 1] * (scale[d + 1] * down));
      }
    }
    __syncthreads();
    add_products<T, D>(dvalues, maps, gradients);
    __syncthreads();
    store_map(maps, dlogits);
    __syncthreads();
    if constexpr (std::is_same_v<T, __half>) {
      float part[D / 8][4] = {};
      add_products<T, D>(part, maps, queries);
#pragma unroll
      for (int c = 0; c < D / 8; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) dkeys[c][i] += down * part[c][i];
    } else {
      add_products<T, D>(dkeys, maps, queries);
    }
    __syncthreads();
  }
  float *sums = g.head_sums + ((b * a.H + h) * g.chunks + index) * head_size(P, D);
#pragma unroll
  for (int c = 0; c < D / 8; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int p = warp * 16 + group + i / 2 * 8, d = 8 * c + 2 * t + i % 2;
      if (p >= P) continue;
      sums[p * D + d] = dkeys[c][i];
      sums[(P + p) * D + d] = dvalues[c][i];
    }
  // Sums of dlogits: over the lanes that share columns, then over warps.
  float *parts = reinterpret_cast<float *>(maps);
#pragma unroll
  for (int j = 0; j < MAP_GROUPS; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float &value = totals[j][i];
      for (int mask = 4; mask < 32; mask *= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, mask);
      if (group == 0) parts[warp * MAP_COLUMNS + 8 * j + 2 * t + i] = value;
    }
  __syncthreads();
  for (int p = threadIdx.x; p < P; p += MMA_THREADS) {
    float value = 0;
    for (int i = 0; i < MMA_WARPS; ++i) value += parts[i * MAP_COLUMNS + p];
    sums[2 * P * D + p] = value;
  }
}

} // namespace epa::cuda
