// The end of the mix of backward: over heads what the last pass needs, over samples the gradients
// of the parameters.
#pragma once
#include "paired.cuh"

namespace epa::cuda {

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
