// The second pass over the tokens, for every dtype and shape.
//
//   fwd  y, from x directly; or out_s, where it must be whole before it is projected (`flat`)
//   bwd  dq, out_s, and in head_sums of each chunk dkeys, dv_proj, dlogits; keys are scale k_proj
//        and dkeys a sum over centred tokens
//   grid (chunks of tokens, heads or all at once + some rows each of the channel's matrix, B)
//
// The logits are (scale q) k_proj^T: q, not k_proj, takes the scale, as in the Triton kernels.
#pragma once
#include "paired.cuh"

namespace epa::cuda {

// How the output pass ends; of kind sum each adds the channel branch.
enum class Finish : int {
  rows,   // official layout, C divides N: C tokens of a head are D rows of out_s', projected here
  tokens, // layout of tokens: projected here, all heads in one block
  flat    // any other: stored in its layout
};

struct OutputTiles {
  Finish finish;
  int heads;       // of a block: all that a projection of tokens adds up, else 1
  int tokens;      // in a tile of out_s; C where finish is rows
  int map_rows;    // tokens whose map lies in shared memory
  int matrix_rows; // of a block of the channel branch
  int64_t chunk;   // tokens of a block, a multiple of `tokens`
};

// A warp's row of the map: its softmax, with dropout.
template <class T>
__device__ __forceinline__ void drop(const Paired<T> &a, int64_t row_number, Accumulate<T> *row) {
  if (!a.spatial_threshold) return;
  const int64_t seed = *a.seed;
#pragma unroll 1
  for (int p = threadIdx.x % 32; p < a.P; p += 32)
    row[p] *=
        dropout_multiplier<Accumulate<T>>(seed, row_number, p, SPATIAL_MAP, a.spatial_threshold);
}

// out (tokens, stride) of one head, from token n on.
template <class T>
__device__ void spatial_tile(const Paired<T> &a, int64_t b, int h, int64_t n, int tokens,
                             int map_rows, Accumulate<T> *q, Accumulate<T> *map, Accumulate<T> *out,
                             int stride) {
  using A = Accumulate<T>;
  const int C = a.C, D = a.D, P = a.P;
  const A *k_proj = a.k_proj + (b * a.H + h) * P * D, *v_proj = a.v_proj + (b * a.H + h) * P * D;
  for (int start = 0; start < tokens; start += map_rows) {
    const int rows = tokens - start < map_rows ? tokens - start : map_rows;
    Products<A> queries(rows, D);
    while (queries.next()) {
      queries.add(
          C, [&](int i, int k) { return widen(a.x.at(b, n + start + i, k)); },
          [&](int k, int d) { return a.weight(0, h * D + d, k); });
      queries.each([&](int i, int d, A value) {
        q[i * D + d] = (value + a.bias(0, h * D + d)) * a.scale[b * C + h * D + d] * A(LOG2_E);
      });
    }
    __syncthreads();
    Products<A> logits(rows, P);
    while (logits.next()) {
      logits.add(
          D, [&](int i, int d) { return q[i * D + d]; },
          [&](int d, int p) { return k_proj[p * D + d]; });
      logits.each([&](int i, int p, A value) { map[i * P + p] = value; });
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < rows; i += PAIRED_WARPS) {
      softmax(map + i * P, P);
      drop(a, (b * a.H + h) * a.N + n + start + i, map + i * P);
    }
    __syncthreads();
    Products<A> outs(rows, D);
    while (outs.next()) {
      outs.add(
          P, [&](int i, int p) { return map[i * P + p]; },
          [&](int p, int d) { return v_proj[p * D + d]; });
      outs.each([&](int i, int d, A value) { out[(start + i) * stride + d] = value; });
    }
    __syncthreads();
  }
}

// From a tile of out_s, (tokens, width) in shared memory, to y or to out_s in its layout.
template <class T>
__device__ void finish_tile(const Paired<T> &a, int64_t b, int h, int64_t n, int tokens,
                            OutputTiles tiles, const Accumulate<T> *out, T *y, T *out_s) {
  using A = Accumulate<T>;
  const int C = a.C, D = a.D, width = tiles.heads * D;
  const auto channel_value = [&](int64_t row, int c) {
    A value = a.value_constant[b * C + c];
    for (int k = 0; k < C; ++k)
      value += widen(a.x.at(b, row, k)) * a.value_matrix[(b * C + c) * C + k];
    return value;
  };
  if (tiles.finish == Finish::flat) {
    for (int i = threadIdx.x; i < tokens * width; i += PAIRED_THREADS) {
      const int d = i / tokens, t = i % tokens;
      const int64_t f = a.flat(n + t, h, d);
      A value = out[t * width + d];
      if (a.is_sum) value += channel_value(f / C, int(f % C));
      (a.is_sum ? y : out_s)[b * a.N * C + f] = narrow<T>(value);
    }
    return;
  }
  // Rows of out_s' as this tile has them: whole ones, or a head's columns of some.
  const bool is_rows = tiles.finish == Finish::rows;
  const int rows = is_rows ? D : tokens, columns = is_rows ? C : width;
  const int first = is_rows ? 0 : h * D;
  const auto element = [&](int i, int c) { return out[is_rows ? c * width + i : i * width + c]; };
  const auto row = [&](int i) {
    return is_rows ? (int64_t(i) * a.H + h) * (a.N / C) + n / C : n + i;
  };
  if (a.is_sum) {
    Products<A> sum(rows, columns);
    while (sum.next()) {
      sum.add(
          C, [&](int i, int k) { return widen(a.x.at(b, row(i), k)); },
          [&](int k, int c) { return a.value_matrix[(b * C + first + c) * C + k]; });
      sum.each([&](int i, int c, A value) {
        y[(b * a.N + row(i)) * C + first + c] =
            narrow<T>(value + element(i, c) + a.value_constant[b * C + first + c]);
      });
    }
  } else {
    Products<A> sum(rows, a.O);
    while (sum.next()) {
      sum.add(C, element, [&](int k, int o) { return a.out_proj_weight[o * C + k]; });
      sum.each([&](int i, int o, A value) {
        if (a.out_proj_bias) value += a.out_proj_bias[o];
        y[(b * a.N + row(i)) * C + o] = narrow<T>(value);
      });
    }
  }
}

// Some columns of y_c = x (Wo2 A Wvc)^T + constants; their rows of the matrix in shared memory.
template <class T>
__device__ void channel_outputs(const Paired<T> &a, int64_t b, int64_t start, int tokens, int first,
                                int outputs, Accumulate<T> *matrix, T *y) {
  using A = Accumulate<T>;
  EPA_SHARED(A, constants, [MATRIX_ROWS]);
  const int C = a.C;
  for (int i = threadIdx.x; i < outputs * C; i += PAIRED_THREADS)
    matrix[i] = a.matrix(b, first + i / C, i % C);
  if (int(threadIdx.x) < outputs) constants[threadIdx.x] = a.constant(b, first + threadIdx.x);
  __syncthreads();
  Products<A> sum(tokens, outputs);
  while (sum.next()) {
    sum.add(
        C, [&](int i, int k) { return widen(a.x.at(b, start + i, k)); },
        [&](int k, int o) { return matrix[o * C + k]; });
    sum.each([&](int i, int o, A value) {
      y[(b * a.N + start + i) * C + a.O + first + o] = narrow<T>(value + constants[o]);
    });
  }
}

template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_output_fwd_kernel(Paired<T> a, OutputTiles tiles, T *y, T *out_s) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(A, shared); // out (tokens, heads D), q (map_rows, D), map (map_rows, P)
  const int64_t start = blockIdx.x * tiles.chunk, b = blockIdx.z;
  const int tokens = int(a.N - start < tiles.chunk ? a.N - start : tiles.chunk);
  const int groups = a.H / tiles.heads, job = blockIdx.y;
  if (job >= groups) {
    const int first = (job - groups) * tiles.matrix_rows;
    const int outputs = a.O - first < tiles.matrix_rows ? a.O - first : tiles.matrix_rows;
    return channel_outputs(a, b, start, tokens, first, outputs, shared, y);
  }
  const int width = tiles.heads * a.D;
  A *q = shared + tiles.tokens * width, *map = q + tiles.map_rows * a.D;
  for (int t = 0; t < tokens; t += tiles.tokens) {
    const int inside = tokens - t < tiles.tokens ? tokens - t : tiles.tokens;
    for (int i = 0; i < tiles.heads; ++i)
      spatial_tile(a, b, job * tiles.heads + i, start + t, inside, tiles.map_rows, q, map,
                   shared + i * a.D, width);
    finish_tile(a, b, job, start + t, inside, tiles, shared, y, out_s);
    __syncthreads();
  }
}

// Of a chunk: dmatrix = dy_c^T (x - mean) and dconstant = sum dy_c, some rows of them.
template <class T>
__device__ void channel_sums(const Paired<T> &a, const PairedBackward<T> &g, int64_t b,
                             int64_t start, int tokens, int first) {
  using A = Accumulate<T>;
  const int C = a.C, O = a.O, outputs = O - first < MATRIX_ROWS ? O - first : MATRIX_ROWS;
  const int64_t at = (b * g.chunks + blockIdx.x) * O + first;
  const auto dy = [&](int o, int n) {
    return widen(g.dy[(b * a.N + start + n) * C + C - O + first + o]);
  };
  Products<A> sum(outputs, C);
  while (sum.next()) {
    sum.add(tokens, dy, [&](int n, int c) { return a.centred_x(b, start + n, c); });
    sum.each([&](int o, int c, A value) { g.matrix_sums[(at + o) * C + c] = value; });
  }
  if (int(threadIdx.x) < outputs) {
    A constant = 0;
    for (int n = 0; n < tokens; ++n) constant += dy(threadIdx.x, n);
    g.constant_sums[at + threadIdx.x] = constant;
  }
}

// A thread owns the same elements of the sums at every tile; `rows` tokens a tile.
template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_output_bwd_kernel(Paired<T> a, PairedBackward<T> g, int rows) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(A, q_centred); // (rows, D), then map and dlogits (rows, P)
  const int64_t index = blockIdx.x, b = blockIdx.z, start = index * g.chunk;
  const int chunk = int(a.N - start < g.chunk ? a.N - start : g.chunk);
  const int h = blockIdx.y, C = a.C, D = a.D, P = a.P;
  if (h >= a.H) return channel_sums(a, g, b, start, chunk, (h - a.H) * MATRIX_ROWS);
  const int64_t head = b * C + h * D, row_number = (b * a.H + h) * a.N;
  const A *k_proj = a.k_proj + (b * a.H + h) * P * D, *v_proj = a.v_proj + (b * a.H + h) * P * D;
  const A *scale = a.scale + head;
  A *map = q_centred + rows * D, *dlogits = map + rows * P;
  A *dkeys = g.head_sums + ((b * a.H + h) * g.chunks + index) * head_size(P, D);
  A *dv_proj = dkeys + P * D, *totals = dv_proj + P * D;
  const int64_t seed = a.spatial_threshold ? *a.seed : 0;
  for (int first = 0; first < chunk; first += rows) {
    const int inside = chunk - first < rows ? chunk - first : rows;
    const int64_t n = start + first;
    const auto dout = [&](int i, int d) {
      return widen(g.dout[b * a.N * C + a.flat(n + i, h, d)]);
    };
    Products<A> queries(inside, D);
    while (queries.next()) {
      queries.add(
          C, [&](int i, int k) { return a.centred_x(b, n + i, k); },
          [&](int k, int d) { return a.weight(0, h * D + d, k); });
      queries.each([&](int i, int d, A value) { q_centred[i * D + d] = value; });
    }
    __syncthreads();
    Products<A> logits(inside, P);
    while (logits.next()) {
      logits.add(
          D,
          [&](int i, int d) {
            return (q_centred[i * D + d] + a.q_mean[head + d]) * scale[d] * A(LOG2_E);
          },
          [&](int d, int p) { return k_proj[p * D + d]; });
      logits.each([&](int i, int p, A value) { map[i * P + p] = value; });
    }
    Products<A> dattention(inside, P);
    while (dattention.next()) {
      dattention.add(D, dout, [&](int d, int p) { return v_proj[p * D + d]; });
      dattention.each([&](int i, int p, A value) { dlogits[i * P + p] = value; });
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < inside; i += PAIRED_WARPS) {
      A *weights = map + i * P, *gradients = dlogits + i * P, along = 0;
      const auto kept = [&](int p) {
        return a.spatial_threshold ? dropout_multiplier<A>(seed, row_number + n + i, p, SPATIAL_MAP,
                                                           a.spatial_threshold)
                                   : A(1);
      };
      softmax(weights, P);
#pragma unroll 1
      for (int p = threadIdx.x % 32; p < P; p += 32) {
        gradients[p] *= kept(p);
        along += weights[p] * gradients[p];
      }
      along = warp_sum(along);
#pragma unroll 1
      for (int p = threadIdx.x % 32; p < P; p += 32) {
        gradients[p] = weights[p] * (gradients[p] - along);
        weights[p] *= kept(p);
      }
    }
    __syncthreads();
    Products<A> outs(inside, D);
    while (!a.is_sum && outs.next()) {
      outs.add(
          P, [&](int i, int p) { return map[i * P + p]; },
          [&](int p, int d) { return v_proj[p * D + d]; });
      outs.each([&](int i, int d, A value) {
        g.out_s[b * a.N * C + a.flat(n + i, h, d)] = narrow<T>(value);
      });
    }
    Products<A> dqueries(inside, D);
    while (dqueries.next()) {
      dqueries.add(
          P, [&](int i, int p) { return dlogits[i * P + p]; },
          [&](int p, int d) { return k_proj[p * D + d]; });
      dqueries.each([&](int i, int d, A value) {
        g.dq[(b * a.N + n + i) * C + h * D + d] = narrow<T>(value * scale[d]);
      });
    }
    const auto add_to = [&](A *sums, int columns) {
      return [=](int i, int c, A value) {
        A &to = sums[int64_t(i) * columns + c];
        to = first ? to + value : value;
      };
    };
    Products<A> key_sums(P, D);
    while (key_sums.next()) {
      key_sums.add(
          inside, [&](int p, int i) { return dlogits[i * P + p]; },
          [&](int i, int d) { return q_centred[i * D + d]; });
      key_sums.each(add_to(dkeys, D));
    }
    Products<A> value_sums(P, D);
    while (value_sums.next()) {
      value_sums.add(inside, [&](int p, int i) { return map[i * P + p]; }, dout);
      value_sums.each(add_to(dv_proj, D));
    }
    for (int p = threadIdx.x; p < P; p += PAIRED_THREADS) {
      A total = first ? totals[p] : A(0);
      for (int i = 0; i < inside; ++i) total += dlogits[i * P + p];
      totals[p] = total;
    }
    __syncthreads();
  }
}

} // namespace epa::cuda
