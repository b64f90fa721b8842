// Between the passes of backward; two_pass._Mix.backward.
//
//   mix_bwd  what follows from the sums of one head of one sample, a block each; further blocks
//            make dq^T (x - mean) and dy_s^T out_s' of each chunk     grid (heads + jobs, B)
//   gather   over heads: what the last pass needs; over samples: the gradients of the parameters
#pragma once
#include "paired_mma.cuh"

namespace epa::cuda {

// sum over chunks of element i of sums (chunks, size)
template <class A>
__device__ __forceinline__ A sum_chunks_of(const A *sums, int chunks, int64_t size, int64_t i) {
  A sum = 0;
#pragma unroll 8
  for (int t = 0; t < chunks; ++t) sum += sums[t * size + i];
  return sum;
}

// dvalue_matrix and dvalue_constant of a head, from the sums of its sample; the first head leaves
// those, added up, as dmatrix and dconstant.
template <class T>
__device__ void value_gradients(const Paired<T> &a, const PairedBackward<T> &g, int64_t b, int h,
                                Accumulate<T> *constants, Accumulate<T> *strip, int width) {
  using A = Accumulate<T>;
  const int C = a.C, D = a.D, O = a.O;
  const A *constant_sums = g.constant_sums + b * g.chunks * O;
  const A *matrix_sums = g.matrix_sums + b * g.chunks * O * C;
  for (int o = threadIdx.x; o < O; o += PAIRED_THREADS) {
    constants[o] = sum_chunks_of(constant_sums, g.chunks, O, o);
    if (h == 0) g.dconstant[b * O + o] = constants[o];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < D; i += PAIRED_THREADS) {
    A constant = 0;
    if (a.is_sum)
      constant = constants[h * D + i];
    else
      for (int o = 0; o < O; ++o) constant += a.out_proj2_weight[o * C + h * D + i] * constants[o];
    g.dvalue_constant[b * C + h * D + i] = constant;
  }
  for (int first = 0; first < C; first += width) {
    const int columns = C - first < width ? C - first : width;
    for (int i = threadIdx.x; i < O * columns; i += PAIRED_THREADS) {
      const int o = i / columns, c = first + i % columns;
      // The sums are of x without its mean.
      strip[i] = sum_chunks_of(matrix_sums, g.chunks, int64_t(O) * C, int64_t(o) * C + c) +
                 constants[o] * A(a.mean[b * C + c]);
      if (h == 0) g.dmatrix[(b * O + o) * C + c] = strip[i];
    }
    __syncthreads();
    Products<A> sum(D, columns);
    while (sum.next()) {
      if (!a.is_sum)
        sum.add(
            O, [&](int i, int o) { return a.out_proj2_weight[o * C + h * D + i]; },
            [&](int o, int c) { return strip[o * columns + c]; });
      sum.each([&](int i, int c, A value) {
        g.dvalue_matrix[(b * C + h * D + i) * C + first + c] =
            a.is_sum ? strip[(h * D + i) * columns + c] : value;
      });
    }
    __syncthreads();
  }
}

// ddots, d|q| / |q|, d|k| / |k| and dtemperature; rows (warps, D) and totals (D) are shared memory.
template <class T>
__device__ void channel_gradients(const Paired<T> &a, const PairedBackward<T> &g, int64_t b, int h,
                                  Accumulate<T> *rows, Accumulate<T> *totals) {
  using A = Accumulate<T>;
  const int C = a.C, D = a.D, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t head = b * C + h * D, square = (b * a.H + h) * D * D;
  const int64_t seed = a.channel_threshold ? *a.seed : 0;
  Products<A> dattention(D, D);
  while (dattention.next()) {
    dattention.add(
        C, [&](int i, int k) { return g.dvalue_matrix[(head + i) * C + k]; },
        [&](int k, int j) { return a.weight(2, h * D + j, k); });
    dattention.each([&](int i, int j, A value) {
      g.ddots[square + i * D + j] = value + g.dvalue_constant[head + i] * a.bias(2, h * D + j);
    });
  }
  __syncthreads();
  const A t = a.temperature[h];
  for (int i = warp; i < D; i += PAIRED_WARPS) {
    A *row = g.ddots + square + i * D, *weights = rows + warp * D, along = 0, total = 0,
      cosines = 0;
    channel_softmax(a, b, h, i, weights);
#pragma unroll 1
    for (int j = lane; j < D; j += 32) {
      if (a.channel_threshold)
        row[j] *=
            dropout_multiplier<A>(seed, (b * a.H + h) * D + i, j, CHANNEL_MAP, a.channel_threshold);
      along += weights[j] * row[j];
    }
    along = warp_sum(along);
    const A q_norm = a.q_norm[head + i];
    for (int j = lane; j < D; j += 32) {
      const A dlogit = weights[j] * (row[j] - along), norms = q_norm * a.k_norm[head + j];
      const A cosine = a.dots[square + i * D + j] / norms;
      total += dlogit * cosine;
      cosines += t * dlogit * cosine;
      row[j] = t * dlogit / norms;
    }
    total = warp_sum(total);
    cosines = warp_sum(cosines);
    if (lane) continue;
    totals[i] = total;
    g.dq_norm[head + i] = norm_gradient(cosines, q_norm);
  }
  __syncthreads();
  for (int j = threadIdx.x; j < D; j += PAIRED_THREADS) {
    A cosines = 0;
    for (int i = 0; i < D; ++i) cosines += g.ddots[square + i * D + j] * a.dots[square + i * D + j];
    g.dk_norm[head + j] = norm_gradient(cosines, a.k_norm[head + j]);
  }
  if (threadIdx.x == 0) {
    A total = 0;
    for (int i = 0; i < D; ++i) total += totals[i];
    g.dtemperature[b * a.H + h] = total;
  }
  // Nobody writes totals before they are read.
  __syncthreads();
}

// From the sums over chunks to dk_proj, dv_proj and all that a bias or a mean takes of them.
template <class T>
__device__ void spatial_gradients(const Paired<T> &a, const PairedBackward<T> &g, int64_t b, int h,
                                  Accumulate<T> *totals) {
  using A = Accumulate<T>;
  const int C = a.C, D = a.D, P = a.P, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t head = b * C + h * D, size = head_size(P, D), number = b * a.H + h;
  A *sums = g.head_totals + number * size;
  for (int64_t i = threadIdx.x; i < size; i += PAIRED_THREADS)
    sums[i] = sum_chunks_of(g.head_sums + number * g.chunks * size, g.chunks, size, i);
  __syncthreads();
  const A *dkeys = sums, *dv = dkeys + P * D, *dlogits = dv + P * D;
  const A *k_proj = a.k_proj + number * P * D, *scale = a.scale + head;
  // The sums are of q without its mean.
  const auto dkey = [&](int p, int d) {
    return dkeys[p * D + d] + dlogits[p] * a.q_mean[head + d];
  };
  for (int p = warp; p < P; p += PAIRED_WARPS) {
    A bias[2] = {}, row[2] = {};
    for (int d = lane; d < D; d += 32) {
      const A dk = dkey(p, d) * scale[d], value = dv[p * D + d];
      g.dk_proj[(b * P + p) * C + h * D + d] = dk;
      g.dv_proj[(b * P + p) * C + h * D + d] = value;
      bias[0] += dk, bias[1] += value;
      row[0] += dk * a.bias(1, h * D + d), row[1] += value * a.bias(3, h * D + d);
    }
    for (int i = 0; i < 2; ++i) {
      bias[i] = warp_sum(bias[i]);
      row[i] = warp_sum(row[i]);
      if (lane) continue;
      g.dprojection_bias[(number * 2 + i) * P + p] = bias[i];
      g.drow_sums[(number * 2 + i) * P + p] = row[i];
    }
  }
  for (int d = warp; d < D; d += PAIRED_WARPS) {
    A along = 0, total = 0, k_bias = 0, v_bias = 0;
    for (int p = lane; p < P; p += 32) {
      along += dkey(p, d) * k_proj[p * D + d];
      total += dlogits[p] * k_proj[p * D + d];
      if (!a.qkvv_bias) continue;
      k_bias += dkey(p, d) * scale[d] * a.row_sums[p];
      v_bias += dv[p * D + d] * a.row_sums[(a.J - 1) * P + p];
    }
    along = warp_sum(along);
    total = warp_sum(total) * scale[d];
    k_bias = warp_sum(k_bias), v_bias = warp_sum(v_bias);
    if (lane) continue;
    const A norm = a.q_norm[head + d];
    totals[d] = along / norm;
    g.dq_norm[head + d] += norm_gradient(along * scale[d], norm);
    // q_n gets ddots k_n + dq_norm q_n, and k_n gets ddots^T q_n + dk_norm k_n: centred part and
    // mean apart, so that neither cancels against the other.
    const A *ddots = g.ddots + number * D * D;
    A dq_mean = g.dq_norm[head + d] * a.q_mean[head + d];
    A dk_mean = g.dk_norm[head + d] * a.k_mean[head + d], dvc_bias = 0;
    for (int i = 0; i < D; ++i) {
      dq_mean += ddots[d * D + i] * a.k_mean[head + i];
      dk_mean += ddots[i * D + d] * a.q_mean[head + i];
      dvc_bias += a.attention[(number * D + i) * D + d] * g.dvalue_constant[head + i];
    }
    const int64_t q = b * 2 * C + h * D + d, k = q + C;
    g.dmeans[q] = dq_mean, g.dmeans[k] = dk_mean;
    g.dtotals[q] = A(a.N) * dq_mean + total, g.dtotals[k] = A(a.N) * dk_mean;
    A *dbias = g.dqkvv_bias + b * 4 * C + h * D + d;
    dbias[0] = g.dtotals[q], dbias[C] = g.dtotals[k] + k_bias;
    dbias[2 * C] = dvc_bias, dbias[3 * C] = v_bias;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    A total = 0;
    for (int d = 0; d < D; ++d) total += totals[d];
    g.dtemperature2[number] = total;
  }
  // The head's part of dgram = sum_h factors^T [Wq; Wk].
  for (int part = 0; part < 2; ++part) {
    const A *ddots = g.ddots + number * D * D;
    Products<A> sum(D, C);
    while (sum.next()) {
      sum.add(
          D, [&](int i, int k) { return part ? ddots[k * D + i] : ddots[i * D + k]; },
          [&](int k, int c) { return a.weight(1 - part, h * D + k, c); });
      sum.each([&](int i, int c, A value) {
        const A norm = (part ? g.dk_norm : g.dq_norm)[head + i];
        g.factors[(b * 2 * C + part * C + h * D + i) * C + c] =
            value + norm * a.weight(part, h * D + i, c);
      });
    }
  }
}

// Of a chunk of a sample: rows from `first` on of dq^T (x - mean).
template <class T>
__device__ void q_weight_gradients(const Paired<T> &a, const PairedBackward<T> &g, int64_t b,
                                   int index, int first) {
  using A = Accumulate<T>;
  const int C = a.C, rows = C - first < MATRIX_ROWS ? C - first : MATRIX_ROWS;
  const int64_t start = index * g.chunk;
  Products<A> sum(rows, C);
  while (sum.next()) {
    sum.add(
        int(a.N - start < g.chunk ? a.N - start : g.chunk),
        [&](int i, int n) { return widen(g.dq[(b * a.N + start + n) * C + first + i]); },
        [&](int n, int c) { return a.centred_x(b, start + n, c); });
    sum.each([&](int i, int c, A value) {
      g.q_weight_sums[((b * g.chunks + index) * C + first + i) * C + c] = value;
    });
  }
}

// Of a chunk of a sample: rows from `first` on of dy_s^T out_s', and sums of dy_s.
template <class T>
__device__ void out_proj_gradients(const Paired<T> &a, const PairedBackward<T> &g, int64_t b,
                                   int index, int first) {
  using A = Accumulate<T>;
  const int C = a.C, O = a.O, outputs = O - first < MATRIX_ROWS ? O - first : MATRIX_ROWS;
  const int64_t start = index * g.chunk, from = (b * a.N + start) * C;
  const int tokens = int(a.N - start < g.chunk ? a.N - start : g.chunk);
  const int64_t at = (b * g.chunks + index) * O + first;
  const auto dy = [&](int o, int n) { return widen(g.dy[from + int64_t(n) * C + first + o]); };
  Products<A> sum(outputs, C);
  while (sum.next()) {
    sum.add(tokens, dy, [&](int n, int c) { return widen(g.out_s[from + int64_t(n) * C + c]); });
    sum.each([&](int o, int c, A value) { g.out_proj_sums[(at + o) * C + c] = value; });
  }
  if (int(threadIdx.x) < outputs) {
    A total = 0;
    for (int n = 0; n < tokens; ++n) total += dy(threadIdx.x, n);
    g.out_proj_bias_sums[at + threadIdx.x] = total;
  }
}

// `width` columns of dmatrix at a time.
template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_mix_bwd_kernel(Paired<T> a, PairedBackward<T> g, int width) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(A, shared); // (O) and a strip (O, width), or (warps + 1, D)
  const int64_t b = blockIdx.y;
  const int h = blockIdx.x;
  if (h >= a.H && g.is_specialised) {
    if constexpr (sizeof(T) <= 4) {
      const int blocks =
          blocks_of_64(a.C) * (blocks_of_64(a.C) + (a.is_sum ? 0 : blocks_of_64(a.O)));
      weight_sums_mma(a, g, b, (h - a.H) / blocks, (h - a.H) % blocks,
                      reinterpret_cast<T *>(shared));
    }
    return;
  }
  if (h >= a.H) {
    const int of_q = (a.C + MATRIX_ROWS - 1) / MATRIX_ROWS;
    const int blocks = of_q + (a.is_sum ? 0 : (a.O + MATRIX_ROWS - 1) / MATRIX_ROWS);
    const int index = (h - a.H) / blocks, job = (h - a.H) % blocks;
    if (job < of_q) return q_weight_gradients(a, g, b, index, job * MATRIX_ROWS);
    return out_proj_gradients(a, g, b, index, (job - of_q) * MATRIX_ROWS);
  }
  value_gradients(a, g, b, h, shared, shared + a.O, width);
  A *totals = shared + PAIRED_WARPS * a.D;
  channel_gradients(a, g, b, h, shared, totals);
  spatial_gradients(a, g, b, h, totals);
}

// target[first + i] = sum_row from[row * stride + i]
template <class T>
__device__ void sum_rows(Parameter<T> target, int64_t first, int size, const Accumulate<T> *from,
                         int64_t rows, int64_t stride) {
  for (int i = threadIdx.x; target && i < size; i += PAIRED_THREADS) {
    Accumulate<T> sum = 0;
#pragma unroll 8
    for (int64_t row = 0; row < rows; ++row) sum += from[row * stride + i];
    target.store(first + i, sum);
  }
}

// Biases and temperatures.
template <class T>
__device__ void gather_vectors(const Paired<T> &a, const PairedBackward<T> &g, int64_t B) {
  const int H = a.H, C = a.C, P = a.P, O = a.O;
  sum_rows(g.qkvv_bias, 0, 4 * C, g.dqkvv_bias, B, 4 * C);
  sum_rows(g.temperature, 0, H, g.dtemperature, B, H);
  sum_rows(g.temperature2, 0, H, g.dtemperature2, B, H);
  sum_rows(g.out_proj2_bias, 0, O, g.dconstant, B, O);
  sum_rows(g.out_proj_bias, 0, O, g.out_proj_bias_sums, B * g.chunks, O);
  // One projection has the rows of keys and of values, in turns; two have one each.
  const int64_t rows = a.J == 1 ? 2 * B * H : B * H, stride = a.J == 1 ? P : 2 * P;
  sum_rows(g.proj_k_bias, 0, P, g.dprojection_bias, rows, stride);
  if (a.J == 2) sum_rows(g.proj_v_bias, 0, P, g.dprojection_bias + P, rows, stride);
  for (int j = 0; a.qkvv_bias && j < a.J; ++j)
    sum_rows<T>({g.drows, true}, j * P, P, g.drow_sums + j * P, rows, stride);
}

// Rows of the gradient of a part of qkvv_weight, from row `first` of head h on.
template <class T>
__device__ void gather_qkvv_weight(const Paired<T> &a, const PairedBackward<T> &g, int B, int part,
                                   int h, int first) {
  using A = Accumulate<T>;
  const int C = a.C, D = a.D, P = a.P, rows = D - first < MATRIX_ROWS ? D - first : MATRIX_ROWS;
  const int channel = h * D + first;
  Products<A> sum(rows, C);
  while (sum.next()) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t square = (b * a.H + h) * D * D, head = (b * C + h * D) * C;
      // Of the channel map, or of ddots, a row i or a column i.
      const A *map = (part == 2 ? a.attention : g.ddots) + square;
      const A *others = part == 0   ? a.k_gram + head
                        : part == 1 ? a.q_gram + head
                                    : g.dvalue_matrix + head;
      if (part < 3)
        sum.add(
            D,
            [&](int i, int k) { return part ? map[k * D + first + i] : map[(first + i) * D + k]; },
            [&](int k, int c) { return others[int64_t(k) * C + c]; });
      if (part % 2) {
        const A *rows_of = (part == 1 ? g.dk_proj : g.dv_proj) + b * P * C + channel;
        const A *z = a.projected + (b * a.J + (part == 1 ? 0 : a.J - 1)) * P * C;
        sum.add(
            P, [&](int i, int p) { return rows_of[int64_t(p) * C + i]; },
            [&](int p, int c) { return z[int64_t(p) * C + c]; });
      }
    }
    sum.each([&](int i, int c, A value) {
      for (int64_t b = 0; part < 2 && b < B; ++b) {
        const int64_t at = b * C + channel + i;
        value += (part ? g.dk_norm : g.dq_norm)[at] * (part ? a.k_gram : a.q_gram)[at * C + c];
        value += g.dtotals[(b * 2 + part) * C + channel + i] * A(a.mean[b * C + c]);
        if (part == 0)
          value += sum_chunks_of(g.q_weight_sums + b * g.chunks * C * C, g.chunks, int64_t(C) * C,
                                 int64_t(channel + i) * C + c);
      }
      g.qkvv_weight.store((int64_t(part) * C + channel + i) * C + c, value);
    });
  }
}

// Where the blocks of each section end, in the order in which the grid has them.
struct GatherBlocks {
  int dgram, dprojected, matrix, qkvv_weight, out_proj2_weight, out_proj_weight;
};

template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_gather_bwd_kernel(Paired<T> a, PairedBackward<T> g, int B, GatherBlocks ends) {
  using A = Accumulate<T>;
  const int C = a.C, P = a.P, O = a.O, block = blockIdx.x;
  const auto blocks_of = [](int size, int rows) { return (size + rows - 1) / rows; };
  const auto rows_of = [](int size, int first, int rows) {
    return size - first < rows ? size - first : rows;
  };
  if (block < ends.dgram) {
    const int blocks = blocks_of(C, MATRIX_ROWS), first = block % blocks * MATRIX_ROWS;
    const int64_t b = block / blocks;
    const A *factors = g.factors + b * 2 * C * C;
    Products<A> sum(rows_of(C, first, MATRIX_ROWS), C);
    while (sum.next()) {
      sum.add(
          2 * C, [&](int r, int k) { return factors[int64_t(k) * C + first + r]; },
          [&](int k, int c) { return a.qkvv_weight[int64_t(k) * C + c]; });
      sum.each([&](int r, int c, A value) { g.dgram[(b * C + first + r) * C + c] = value; });
    }
    for (int c = first + threadIdx.x; c < first + MATRIX_ROWS && c < C; c += PAIRED_THREADS) {
      A token = 0;
      for (int k = 0; k < 2 * C; ++k)
        token += g.dmeans[b * 2 * C + k] * a.qkvv_weight[int64_t(k) * C + c];
      g.dtoken[b * C + c] = token;
    }
  } else if (block < ends.dprojected) {
    const int blocks = blocks_of(P, PROJECTED_ROWS), number = (block - ends.dgram) / blocks;
    const int first = (block - ends.dgram) % blocks * PROJECTED_ROWS, j = number % a.J;
    const int64_t b = number / a.J;
    Products<A> sum(rows_of(P, first, PROJECTED_ROWS), C);
    while (sum.next()) {
      for (int is_value = a.J == 2 ? j : 0; is_value < (a.J == 2 ? j + 1 : 2); ++is_value) {
        const A *from = (is_value ? g.dv_proj : g.dk_proj) + (b * P + first) * C;
        sum.add(
            C, [&](int p, int k) { return from[int64_t(p) * C + k]; },
            [&](int k, int c) { return a.weight(is_value ? 3 : 1, k, c); });
      }
      sum.each([&](int p, int c, A value) {
        g.dprojected[((b * a.J + j) * P + first + p) * C + c] = value;
      });
    }
  } else if (block < ends.matrix) {
    const int blocks = blocks_of(O, MATRIX_ROWS);
    const int first = (block - ends.dprojected) % blocks * MATRIX_ROWS;
    const int64_t b = (block - ends.dprojected) / blocks;
    for (int i = threadIdx.x; i < rows_of(O, first, MATRIX_ROWS) * C; i += PAIRED_THREADS)
      g.matrix[(b * O + first) * C + i] = a.matrix(b, first + i / C, i % C);
  } else if (block < ends.qkvv_weight) {
    const int blocks = blocks_of(a.D, MATRIX_ROWS), number = (block - ends.matrix) / blocks;
    gather_qkvv_weight(a, g, B, number / a.H, number % a.H,
                       (block - ends.matrix) % blocks * MATRIX_ROWS);
  } else if (block < ends.out_proj2_weight) {
    const int first = (block - ends.qkvv_weight) * MATRIX_ROWS;
    Products<A> sum(rows_of(O, first, MATRIX_ROWS), C);
    while (sum.next()) {
      for (int64_t b = 0; b < B; ++b)
        sum.add(
            C, [&](int o, int k) { return g.dmatrix[(b * O + first + o) * C + k]; },
            [&](int k, int i) { return a.value_matrix[(b * C + i) * C + k]; });
      sum.each([&](int o, int i, A value) {
        for (int64_t b = 0; b < B; ++b)
          value += g.dconstant[b * O + first + o] * a.value_constant[b * C + i];
        g.out_proj2_weight.store((first + o) * C + i, value);
      });
    }
  } else if (block < ends.out_proj_weight) {
    const int first = (block - ends.out_proj2_weight) * MATRIX_ROWS;
    sum_rows(g.out_proj_weight, first * C, rows_of(O, first, MATRIX_ROWS) * C,
             g.out_proj_sums + first * C, int64_t(B) * g.chunks, int64_t(O) * C);
  } else {
    gather_vectors(a, g, B);
  }
}

} // namespace epa::cuda
