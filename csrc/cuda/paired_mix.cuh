// Between the passes: all that follows from mean, gram and projected, one head or a few projected
// rows a block; two_pass._Mix.
//
//   grid   (jobs, B): heads, then rows of k_proj and v_proj; in backward tiles of dout = dy_s Wo1
//   merge  a block adds up what it needs of the summary's chunks; head 0 keeps mean and gram
//   direct where N < 2C there was no summary: from q and k without their means, norms and products
//          too, since Wq M = (Wq (x - mu)^T) (x - mu); and Z = E x right here
#pragma once
#include "paired_mma_product.cuh"

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
    sum.add(
        N, [&](int i, int k) { return centred[int64_t(k) * 2 * D + i]; }, x);
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

// dout = dy_s Wo1, of TOKEN_ROWS tokens from `start` on.
template <class T>
__device__ void project_back(const Paired<T> &a, int64_t b, int64_t start, const T *dy, T *dout) {
  using A = Accumulate<T>;
  const int rows = a.N - start < TOKEN_ROWS ? int(a.N - start) : TOKEN_ROWS;
  Products<A> sum(rows, a.C);
  while (sum.next()) {
    sum.add(
        a.O, [&](int i, int k) { return widen(dy[(b * a.N + start + i) * a.C + k]); },
        [&](int k, int c) { return a.out_proj_weight[k * a.C + c]; });
    sum.each(
        [&](int i, int c, A value) { dout[(b * a.N + start + i) * a.C + c] = narrow<T>(value); });
  }
}

// `width` columns of the gram at a time; dy is null forward and for kind sum; `chunk` tokens of dout
// a block, 0 where it is not made on tensor cores.
template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_mix_fwd_kernel(Paired<T> a, int width, const T *dy, T *dout, int64_t chunk) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(double, mean); // (C), then a strip (C, width); or a job of dout
  const int64_t b = blockIdx.y;
  int job = blockIdx.x;
  if (job < a.H) return mix_head(a, b, job, mean, reinterpret_cast<A *>(mean + a.C), width);
  job -= a.H;
  const int blocks = (a.P + PROJECTED_ROWS - 1) / PROJECTED_ROWS;
  if (job < a.J * blocks) return mix_projected(a, b, job / blocks, job % blocks * PROJECTED_ROWS);
  job -= a.J * blocks;
  if constexpr (sizeof(T) <= 4)
    if (chunk) {
      const int64_t sample = b * a.N * a.C;
      return project_mma<T, true>(a, job, chunk, dy + sample, dout + sample,
                                  reinterpret_cast<T *>(mean));
    }
  project_back(a, b, int64_t(job) * TOKEN_ROWS, dy, dout);
}

} // namespace epa::cuda
