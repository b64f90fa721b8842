// The first pass over the tokens, and the last one of backward.
//
//   fwd  of each chunk: mean (B, chunks, C), centred gram (.., C, C), projected (.., J, P, C)
//        grid (chunks, blocks of rows of the two and of columns, B)
//   bwd  dx = dq Wq + (x - mean) dgram + dtoken + dy_c matrix + E^T dprojected
//        dE = sum_b dprojected x^T + drows        grid (tiles of tokens, B + J)
#pragma once
#include "paired.cuh"

namespace epa::cuda {

constexpr int SUMMARY_SIDE = 64; // rows and columns of a block

// row_sums (J, P) = sum_n E[p, n]
template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_row_sums_fwd_kernel(Paired<T> a) {
  using A = Accumulate<T>;
  EPA_SHARED(A, totals, [PAIRED_WARPS]);
  const int p = blockIdx.x, j = blockIdx.y;
  A total = 0;
  for (int64_t n = threadIdx.x; n < a.N; n += PAIRED_THREADS) total += a.projection[j].at(p, n);
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) totals[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < PAIRED_WARPS; ++i) total += totals[i];
  a.row_sums[j * a.P + p] = total;
}

template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_summary_fwd_kernel(Paired<T> a) {
  using A = Accumulate<T>;
  EPA_SHARED(A, left, [TOKEN_ROWS * SUMMARY_SIDE]);
  EPA_SHARED(A, right, [TOKEN_ROWS * SUMMARY_SIDE]);
  EPA_SHARED(A, deltas, [2 * SUMMARY_SIDE]);
  const int64_t index = blockIdx.x, b = blockIdx.z, start = index * a.chunk;
  const int column_blocks = (a.C + SUMMARY_SIDE - 1) / SUMMARY_SIDE;
  const int projected_blocks = (a.P + SUMMARY_SIDE - 1) / SUMMARY_SIDE;
  const int block = blockIdx.y / column_blocks;
  const int first_column = blockIdx.y % column_blocks * SUMMARY_SIDE;
  const bool is_gram = block < column_blocks;
  const int j = is_gram ? 0 : (block - column_blocks) / projected_blocks;
  const int first_row =
      (is_gram ? block : (block - column_blocks) % projected_blocks) * SUMMARY_SIDE;
  const int all_rows = is_gram ? a.C : a.P;
  const int rows = all_rows - first_row < SUMMARY_SIDE ? all_rows - first_row : SUMMARY_SIDE;
  const int columns = a.C - first_column < SUMMARY_SIDE ? a.C - first_column : SUMMARY_SIDE;
  const int64_t count = a.tokens_of(index);
  // Of the first threads each has a channel: of the rows, then of the columns.
  const int side = threadIdx.x / SUMMARY_SIDE, own = threadIdx.x % SUMMARY_SIDE;
  const bool has_channel = is_gram && side < 2 && own < (side ? columns : rows);
  A *tile = side ? right : left;
  A mean = 0;
  Products<A> sum(rows, columns);
  const bool has_elements = sum.next();
  for (int64_t n = 0; n < count; n += TOKEN_ROWS) {
    const int inside = count - n < TOKEN_ROWS ? int(count - n) : TOKEN_ROWS;
    // Differences to one token are exact where tokens are nearly constant.
    const auto value = [&](int row, int c) {
      const A x = widen(a.x.at(b, start + n + row, c));
      return is_gram ? x - widen(a.x.at(b, start, c)) : x;
    };
    for (int i = threadIdx.x; i < inside * columns; i += PAIRED_THREADS)
      right[i / columns * SUMMARY_SIDE + i % columns] =
          value(i / columns, first_column + i % columns);
    for (int i = threadIdx.x; is_gram && i < inside * rows; i += PAIRED_THREADS)
      left[i / rows * SUMMARY_SIDE + i % rows] = value(i / rows, first_row + i % rows);
    for (int i = threadIdx.x; !is_gram && i < inside * rows; i += PAIRED_THREADS)
      left[i % inside * SUMMARY_SIDE + i / inside] =
          a.projection[j].at(first_row + i / inside, start + n + i % inside);
    __syncthreads();
    const A share = A(inside) / A(n + inside);
    if (has_channel) {
      A offset = 0;
      for (int i = 0; i < inside; ++i) offset += tile[i * SUMMARY_SIDE + own];
      offset /= inside;
      for (int i = 0; i < inside; ++i) tile[i * SUMMARY_SIDE + own] -= offset;
      deltas[threadIdx.x] = offset - mean;
      mean += share * (offset - mean);
    }
    __syncthreads();
    if (has_elements) {
      // Chan's formula: from the means of the tokens so far and of the tile to the joint one.
      if (is_gram)
        sum.add(
            1, [&](int i, int) { return deltas[i] * share * A(n); },
            [&](int, int i) { return deltas[SUMMARY_SIDE + i]; });
      sum.add(
          inside, [&](int i, int k) { return left[k * SUMMARY_SIDE + i]; },
          [&](int k, int i) { return right[k * SUMMARY_SIDE + i]; });
    }
    __syncthreads();
  }
  const int64_t at = b * gridDim.x + index;
  A *to = is_gram ? a.chunk_grams + at * a.C * a.C : a.chunk_projected + (at * a.J + j) * a.P * a.C;
  if (has_elements)
    sum.each([&](int i, int c, A value) {
      to[int64_t(first_row + i) * a.C + first_column + c] = value;
    });
  if (has_channel && side && block == 0)
    a.chunk_means[at * a.C + first_column + own] =
        double(widen(a.x.at(b, start, first_column + own))) + double(mean);
}

template <class T>
__global__ void __launch_bounds__(PAIRED_THREADS, 2)
    paired_attention_summary_bwd_kernel(Paired<T> a, PairedBackward<T> g, int B) {
  using A = Accumulate<T>;
  const int64_t start = int64_t(blockIdx.x) * TOKEN_ROWS;
  const int rows = a.N - start < TOKEN_ROWS ? int(a.N - start) : TOKEN_ROWS;
  const int C = a.C, O = a.O, P = a.P;
  if (int(blockIdx.y) < B) {
    const int64_t b = blockIdx.y, first = b * a.N + start;
    Products<A> sum(rows, C);
    while (sum.next()) {
      sum.add(
          C, [&](int i, int k) { return widen(g.dq[(first + i) * C + k]); },
          [&](int k, int c) { return a.weight(0, k, c); });
      sum.add(
          C, [&](int i, int k) { return a.centred_x(b, start + i, k); },
          [&](int k, int c) { return g.dgram[(b * C + k) * C + c]; });
      sum.add(
          O, [&](int i, int k) { return widen(g.dy[(first + i) * C + C - O + k]); },
          [&](int k, int c) { return g.matrix[(b * O + k) * C + c]; });
      for (int j = 0; j < a.J; ++j)
        sum.add(
            P, [&](int i, int k) { return a.projection[j].at(k, start + i); },
            [&](int k, int c) { return g.dprojected[((b * a.J + j) * P + k) * C + c]; });
      sum.each([&](int i, int c, A value) {
        g.dx.at(b, start + i, c) = narrow<T>(value + g.dtoken[b * C + c]);
      });
    }
  } else {
    const int j = blockIdx.y - B;
    Products<A> sum(P, rows);
    while (sum.next()) {
      for (int64_t b = 0; b < B; ++b)
        sum.add(
            C, [&](int p, int k) { return g.dprojected[((b * a.J + j) * P + p) * C + k]; },
            [&](int k, int i) { return widen(a.x.at(b, start + i, k)); });
      sum.each([&](int p, int i, A value) {
        const A drow = a.qkvv_bias ? g.drows[j * P + p] : A(0);
        const Projection<T> &to = g.dprojection[j];
        to.weight.store(to.offset(p, start + i), value + drow);
      });
    }
  }
}

} // namespace epa::cuda
