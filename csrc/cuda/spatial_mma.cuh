// Spatial attention's output pass on tensor cores, P up to 64: T __nv_bfloat16 or __half and D in
// {8, 16, 32, 64}, or float and D in {8, 16}.
//
//   A warp owns 16 tokens of a head, rows g and g + 8 of a lane with g = lane / 4; the map's rows
//   never leave its registers forward: an accumulator, packed, is the next product's factor.
//   Backward, sums over tokens need the map transposed: it goes through shared memory, where each
//   warp then owns 16 projected tokens of both sums.
//   k_proj and v_proj lie in shared memory once a block: up to 46 KB, for 16 bits and D = 64
//   backward.
#pragma once
#include "fragments.cuh"
#include "spatial.cuh"

namespace epa::cuda {

// Registers for six blocks or four: left to itself, ptxas spills to have eight on sm_100 and
// sm_120.
template <class T, int D>
__global__ void __launch_bounds__(MMA_THREADS, sizeof(T) == 2 && D < 64 ? 6 : 4)
    spatial_attention_output_fwd_mma_kernel(Spatial<T> a, const float *squares, int count,
                                            Heads<T> out) {
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

// dq without the norm's part, sums. Registers for three blocks or two: left to itself, ptxas
// spills to have more on sm_80 and sm_120.
template <class T, int D>
__global__ void __launch_bounds__(MMA_THREADS, sizeof(T) == 2 && D < 64 ? 3 : 2)
    spatial_attention_output_bwd_mma_kernel(Spatial<T> a, Heads<const T> dout, Heads<T> dq,
                                            float *sums) {
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
    softmax_backward(weights, dlogits, total, kept, multiplier);
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
