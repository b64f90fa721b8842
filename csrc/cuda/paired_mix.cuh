// Between the passes, one head or a few projected rows a block; two_pass._Mix and its backward.
// paired_mix_mma.cuh has the two kernels, whose grids have jobs on tensor cores beside these.
//
//   merge  a block adds up what it needs of the summary's chunks; head 0 keeps mean and gram
//   direct where N < 2C there was no summary: from q and k without their means, norms and products
//          too, since Wq M = (Wq (x - mu)^T) (x - mu); and Z = E x right here
//   bwd    what follows from the sums of one head of one sample, a block each; further blocks make
//          dq^T (x - mean) and dy_s^T out_s' of each chunk
#pragma once
#include "paired.cuh"

namespace epa::cuda {

template <class A> __device__ __forceinline__ A clamped_square(A value) {
  // Rounding may leave a vanishing square just below zero.
  return value < 0 ? A(0) : value;
}

// Mean of x to shared memory, to the caller's memory by the first head, and the chunks' differences
// from it, each with its share of the weight.
template <class T> __device__ void merge_means(const Paired<T> &a, int64_t b, int h, double *mean) {
  using A = Accumulate<T>;
  const double *means = a.chunk_means + b * a.chunks * a.C;
  A *deltas = a.deltas + (b * a.H + h) * a.chunks * a.C;
  for (int c = threadIdx.x; c < a.C; c += PAIRED_THREADS) {
    if (a.is_direct) {
      const A first = widen(a.x.at(b, 0, c));
      A offset = 0;
      for (int64_t n = 1; n < a.N; ++n) offset += widen(a.x.at(b, n, c)) - first;
      mean[c] = double(first) + double(offset) / double(a.N);
    } else {
      double offset = 0;
      for (int t = 1; t < a.chunks; ++t)
        offset += double(a.tokens_of(t)) * (means[int64_t(t) * a.C + c] - means[c]);
      mean[c] = means[c] + offset / double(a.N);
    }
    for (int t = 0; a.chunks > 1 && t < a.chunks; ++t)
      deltas[int64_t(t) * a.C + c] =
          A((means[int64_t(t) * a.C + c] - mean[c]) * sqrt(double(a.tokens_of(t))));
    if (h == 0 && (a.is_direct || a.chunks > 1)) a.mean[b * a.C + c] = mean[c];
  }
  __syncthreads();
}

// q_gram and k_gram of a head from the gram, `width` columns of it at a time in shared memory.
template <class T>
__device__ void multiply_gram(const Paired<T> &a, int64_t b, int h, Accumulate<T> *strip,
                              int width) {
  using A = Accumulate<T>;
  const int C = a.C, D = a.D;
  const A *deltas = a.deltas + (b * a.H + h) * a.chunks * C;
  for (int first = 0; first < C; first += width) {
    const int columns = C - first < width ? C - first : width;
    for (int i = threadIdx.x; i < C * columns; i += PAIRED_THREADS) {
      const int r = i / columns, c = first + i % columns;
      A sum = 0;
#pragma unroll 8
      for (int64_t t = 0; t < a.chunks; ++t)
        sum += a.chunk_grams[((b * a.chunks + t) * C + r) * C + c];
      if (a.chunks > 1) {
#pragma unroll 8
        for (int64_t t = 0; t < a.chunks; ++t) sum += deltas[t * C + r] * deltas[t * C + c];
        if (h == 0) a.gram[(b * C + r) * C + c] = sum;
      }
      strip[i] = sum;
    }
    __syncthreads();
    for (int part = 0; part < 2; ++part) {
      A *to = (part ? a.k_gram : a.q_gram) + (b * C + h * D) * C + first;
      Products<A> sum(D, columns);
      while (sum.next()) {
        sum.add(
            C, [&](int i, int k) { return a.weight(part, h * D + i, k); },
            [&](int k, int c) { return strip[k * columns + c]; });
        sum.each([&](int i, int c, A value) { to[int64_t(i) * C + c] = value; });
      }
    }
    __syncthreads();
  }
}

// The same from the tokens.
template <class T>
__device__ void multiply_tokens(const Paired<T> &a, int64_t b, int h, const double *mean) {
  using A = Accumulate<T>;
  const int N = int(a.N), C = a.C, D = a.D;
  A *centred = a.centred + (b * a.H + h) * N * 2 * D;
  const auto x = [&](int n, int c) { return widen(a.x.at(b, n, c)) - A(mean[c]); };
  Products<A> tokens(N, 2 * D);
  while (tokens.next()) {
    tokens.add(C, x, [&](int k, int i) { return a.weight(i / D, h * D + i % D, k); });
    tokens.each([&](int n, int i, A value) { centred[int64_t(n) * 2 * D + i] = value; });
  }
  __syncthreads();
  Products<A> sum(2 * D, C);
  while (sum.next()) {
    sum.add(N, [&](int i, int k) { return centred[int64_t(k) * 2 * D + i]; }, x);
    sum.each([&](int i, int c, A value) {
      A *to = i < D ? a.q_gram : a.k_gram;
      to[(b * C + h * D + i % D) * C + c] = value;
    });
  }
  __syncthreads();
}

template <class T>
__device__ void mix_head(const Paired<T> &a, int64_t b, int h, double *mean, Accumulate<T> *strip,
                         int width) {
  using A = Accumulate<T>;
  const int C = a.C, D = a.D, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t head = b * C + h * D, square = (b * a.H + h) * D * D;
  const A N = A(a.N);
  merge_means(a, b, h, mean);
  if (a.is_direct)
    multiply_tokens(a, b, h, mean);
  else
    multiply_gram(a, b, h, strip, width);

  const A *tokens = a.centred + (b * a.H + h) * a.N * 2 * D; // (N, 2 D), direct
  for (int i = warp; i < 2 * D; i += PAIRED_WARPS) {
    const int part = i / D, d = i % D;
    const A *gram = (part ? a.k_gram : a.q_gram) + (head + d) * C;
    // In float64: a mean that is small beside the weights would lose its digits.
    double centre = 0;
    A along = 0;
    for (int c = lane; c < C; c += 32) {
      centre += double(a.weight(part, h * D + d, c)) * mean[c];
      if (!a.is_direct) along += gram[c] * a.weight(part, h * D + d, c);
    }
    for (int64_t n = lane; a.is_direct && n < a.N; n += 32)
      along += tokens[n * 2 * D + i] * tokens[n * 2 * D + i];
    centre = warp_sum(centre) + double(a.bias(part, h * D + d));
    along = clamped_square(warp_sum(along)) + N * A(centre) * A(centre);
    if (lane) continue;
    (part ? a.k_mean : a.q_mean)[head + d] = A(centre);
    (part ? a.k_norm : a.q_norm)[head + d] = clamped_norm(along);
    if (part == 0) a.scale[head + d] = a.temperature2[h] / clamped_norm(along);
  }
  __syncthreads();
  Products<A> dots(D, D);
  while (dots.next()) {
    if (a.is_direct)
      dots.add(
          int(a.N), [&](int i, int n) { return tokens[int64_t(n) * 2 * D + i]; },
          [&](int n, int j) { return tokens[int64_t(n) * 2 * D + D + j]; });
    else
      dots.add(
          C, [&](int i, int k) { return a.q_gram[(head + i) * C + k]; },
          [&](int k, int j) { return a.weight(1, h * D + j, k); });
    dots.each([&](int i, int j, A value) {
      a.dots[square + i * D + j] = value + N * a.q_mean[head + i] * a.k_mean[head + j];
    });
  }
  __syncthreads();
  const int64_t seed = a.channel_threshold ? *a.seed : 0;
  for (int i = warp; i < D; i += PAIRED_WARPS) {
    A *row = a.attention + square + i * D;
    channel_softmax(a, b, h, i, row);
    if (a.channel_threshold)
#pragma unroll 1
      for (int j = lane; j < D; j += 32)
        row[j] *=
            dropout_multiplier<A>(seed, (b * a.H + h) * D + i, j, CHANNEL_MAP, a.channel_threshold);
  }
  __syncthreads();
  Products<A> values(D, C);
  while (values.next()) {
    values.add(
        D, [&](int i, int k) { return a.attention[square + i * D + k]; },
        [&](int k, int c) { return a.weight(2, h * D + k, c); });
    values.each([&](int i, int c, A value) { a.value_matrix[(head + i) * C + c] = value; });
  }
  for (int i = threadIdx.x; i < D; i += PAIRED_THREADS) {
    A constant = 0;
    for (int j = 0; j < D; ++j) constant += a.attention[square + i * D + j] * a.bias(2, h * D + j);
    a.value_constant[head + i] = constant;
  }
  if (a.is_sum) return;
  __syncthreads();
  const int64_t part = (b * a.H + h) * a.O;
  Products<A> matrix(a.O, C);
  while (matrix.next()) {
    matrix.add(
        D, [&](int o, int k) { return a.out_proj2_weight[int64_t(o) * C + h * D + k]; },
        [&](int k, int c) { return a.value_matrix[(head + k) * C + c]; });
    matrix.each([&](int o, int c, A value) { a.matrix_parts[(part + o) * C + c] = value; });
  }
  for (int o = threadIdx.x; o < a.O; o += PAIRED_THREADS) {
    A constant = 0;
    for (int k = 0; k < D; ++k)
      constant += a.out_proj2_weight[int64_t(o) * C + h * D + k] * a.value_constant[head + k];
    a.constant_parts[part + o] = constant;
  }
}

// Rows of projected from `first` on, and of what follows from them.
template <class T> __device__ void mix_projected(const Paired<T> &a, int64_t b, int j, int first) {
  using A = Accumulate<T>;
  const int C = a.C, D = a.D, P = a.P;
  const int rows = P - first < PROJECTED_ROWS ? P - first : PROJECTED_ROWS;
  A *z = a.projected + ((b * a.J + j) * P + first) * C;
  if (a.is_direct) {
    Products<A> sum(rows, C);
    while (sum.next()) {
      sum.add(
          int(a.N), [&](int p, int n) { return a.projection[j].at(first + p, n); },
          [&](int n, int c) { return widen(a.x.at(b, n, c)); });
      sum.each([&](int p, int c, A value) { z[int64_t(p) * C + c] = value; });
    }
  } else if (a.chunks > 1) {
    for (int i = threadIdx.x; i < rows * C; i += PAIRED_THREADS) {
      A sum = 0;
#pragma unroll 8
      for (int64_t t = 0; t < a.chunks; ++t)
        sum += a.chunk_projected[(((b * a.chunks + t) * a.J + j) * P + first) * C + i];
      z[i] = sum;
    }
  }
  __syncthreads();
  // One projection serves keys and values.
  for (int is_value = a.J == 2 ? j : 0; is_value < (a.J == 2 ? j + 1 : 2); ++is_value) {
    const int part = is_value ? 3 : 1;
    A *to = is_value ? a.v_proj : a.k_proj;
    const Parameter<T> constant = a.projection_bias[is_value];
    Products<A> sum(rows, C);
    while (sum.next()) {
      sum.add(
          C, [&](int p, int k) { return z[int64_t(p) * C + k]; },
          [&](int k, int i) { return a.weight(part, i, k); });
      sum.each([&](int p, int i, A value) {
        // sum_n E[p,n] (W x_n + bias) = W z_p + bias sum_n E[p,n]
        if (a.qkvv_bias) value += a.row_sums[j * P + first + p] * a.bias(part, i);
        if (constant) value += constant[first + p];
        to[((b * a.H + i / D) * P + first + p) * D + i % D] = value;
      });
    }
  }
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

} // namespace epa::cuda
