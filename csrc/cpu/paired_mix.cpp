// Between the passes: everything small, a C x C product at the largest, nothing of size N.
// Forward turns the summary into keys, values and the channel branch as one matrix a sample;
// backward turns the output pass's sums into every gradient of a weight and into what the last pass
// needs. Each step is one parallel loop over blocks of rows or over heads, with few of them in all.
#include "paired.h"

namespace epa::EPA_ISA {
namespace {

// f(b, first row, rows, scratch) over blocks of the rows of B samples.
template <class F>
void for_rows(int64_t B, int64_t rows, double cost_of_row, int threads, const F &f) {
  const int64_t blocks = row_blocks(rows);
  parallel_for(B * blocks, cost_of_row * BLOCK_ROWS, threads, [&](int64_t index, Scratch &scratch) {
    const int64_t first = index % blocks * BLOCK_ROWS;
    f(index / blocks, first, minimum(BLOCK_ROWS, rows - first), scratch);
  });
}

// row (n) += factor * other (n), n padded to vectors.
template <class T> void add_scaled(T *row, T factor, const T *other, int64_t n) {
  for (int64_t c = 0; c < n; c += LANES<T>)
    store(row + c, load(row + c) + broadcast(factor) * load(other + c));
}

} // namespace

template <class T>
Mix<T> paired_attention_mix_fwd(Layer<T> &layer, const Summary<T> &summary, bool by_output) {
  const int64_t B = layer.B, N = layer.N, C = layer.C, H = layer.H, P = layer.P, D = layer.D;
  const int64_t J = layer.J, O = layer.O, stride = layer.C_padded, P_padded = layer.P_padded;
  const int64_t D_padded = padded<T>(D), O_padded = layer.O_padded;
  Scratch &memory = layer.memory;
  const auto take = [&](int64_t count) { return memory.take<T>(B * count); };
  Mix<T> mix;
  mix.mean = take(stride), mix.q_mean = take(C), mix.k_mean = take(C);
  mix.q_norm = take(C), mix.k_norm = take(C);
  mix.q_gram = take(C * stride), mix.k_gram = take(C * stride);
  mix.k_proj = take(C * P_padded), mix.values = take(C * P_padded), mix.keys = take(C * P_padded);
  mix.cosine = take(C * D_padded), mix.softmax = take(C * D_padded);
  mix.attention = take(C * D_padded);
  mix.value_matrix = take(C * stride), mix.value_constant = take(C);
  mix.matrix = by_output ? take(O * stride) : take(C * O_padded), mix.constant = take(O_padded);

  T *turned = take(J * C * P_padded); // projected, channels as rows
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < stride; ++c)
      mix.mean[b * stride + c] = c < C ? T(summary.mean[b * C + c]) : T(0);
    for (int64_t j = 0; j < J; ++j)
      pack(turned + (b * J + j) * C * P_padded, P_padded,
           matrix(summary.projected + (b * J + j) * P * stride, 1, stride), C, P, P_padded);
  }

  // Rows of Wq M, Wk M, k_proj^T, v_proj^T, with means in float64 and norms.
  const auto norm_of = [&](const T *gram_row, const T *weight_row, double mean) {
    // Rounding may leave a vanishing square just below zero. A NaN stays.
    const T centred = dot<T>(gram_row, weight_row, C);
    const T norm = square_root((centred < 0 ? T(0) : centred) + N * T(mean) * T(mean));
    return norm < T(NORM_EPS) ? T(NORM_EPS) : norm;
  };
  const double cost = 2. * C * C + 2. * C * P;
  for_rows(B, C, cost, layer.a.threads, [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
    const int64_t at = b * C + first;
    for (int k = 0; k < 2; ++k) {
      const T *weight = layer.part(k) + first * stride;
      T *gram = (k ? mix.k_gram : mix.q_gram) + at * stride;
      gemm<T>(rows, C, C, {weight, stride, 1}, summary.gram + b * C * stride, stride, gram, stride);
      for (int64_t r = 0; r < rows; ++r) {
        const double mean =
            dot<double>(weight + r * stride, summary.mean + b * C, C) + layer.bias_of(k, first + r);
        (k ? mix.k_mean : mix.q_mean)[at + r] = T(mean);
        (k ? mix.k_norm : mix.q_norm)[at + r] =
            norm_of(gram + r * stride, weight + r * stride, mean);
      }
    }
    for (int k = 0; k < 2; ++k) {
      const int part = k ? 3 : 1;
      T *to = (k ? mix.values : mix.k_proj) + at * P_padded;
      const T *bias = layer.projection_bias[k], *sums = layer.row_sums[k];
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t p = 0; p < P_padded; ++p)
          to[r * P_padded + p] = p >= P
                                     ? T(0)
                                     : (bias ? bias[p] : T(0)) +
                                           (sums ? sums[p] * layer.bias_of(part, first + r) : T(0));
      gemm<T>(rows, P, C, {layer.part(part) + first * stride, stride, 1},
              turned + (b * J + (k && J == 2)) * C * P_padded, P_padded, to, P_padded, true);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T scale = T(LOG2_E * layer.temperature2[(first + r) / D] / mix.q_norm[at + r]);
      for (int64_t p = 0; p < P_padded; ++p)
        mix.keys[(at + r) * P_padded + p] = mix.k_proj[(at + r) * P_padded + p] * scale;
    }
  });

  // The channel map of each head, and A Wvc.
  parallel_for(B * H, double(D) * D * C * 3, layer.a.threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / H, h = index % H, i = h * D, at = b * C + i;
    T *k_weight = scratch.take<T>(C * D_padded), *dots = mix.cosine + at * D_padded;
    pack(k_weight, D_padded, matrix(layer.part(1) + i * stride, 1, stride), C, D, D_padded);
    for (int64_t r = 0; r < D; ++r)
      for (int64_t j = 0; j < D; ++j)
        dots[r * D_padded + j] = N * mix.q_mean[at + r] * mix.k_mean[at + j];
    gemm<T>(D, D, C, {mix.q_gram + at * stride, stride, 1}, k_weight, D_padded, dots, D_padded,
            true);
    T *attention = mix.attention + at * D_padded;
    channel_map_fwd(layer.channel_map(b, h, mix.q_norm + at, mix.k_norm + at), dots,
                    mix.softmax + at * D_padded, attention);
    gemm<T>(D, C, D, {attention, D_padded, 1}, layer.part(2) + i * stride, stride,
            mix.value_matrix + at * stride, stride);
    for (int64_t r = 0; r < D; ++r)
      mix.value_constant[at + r] =
          layer.bias ? dot<T>(attention + r * D_padded, layer.bias + 2 * C + i, D) : T(0);
  });

  // Behind the output projection: matrix = Wo2 A Wvc, constant = Wo2 A bvc + b2.
  for (int64_t b = 0; b < B; ++b)
    for (int64_t o = 0; o < O_padded; ++o) {
      T constant = 0;
      if (o < O && layer.concatenates())
        constant = (layer.bias ? dot<T>(layer.out_proj2 + o * stride, mix.value_constant + b * C, C)
                               : T(0)) +
                   (layer.out_proj2_bias ? layer.out_proj2_bias[o] : T(0));
      else if (o < O)
        constant = mix.value_constant[b * C + o];
      mix.constant[b * O_padded + o] = constant;
    }
  if (!layer.concatenates()) {
    for (int64_t b = 0; b < B; ++b) {
      const T *from = mix.value_matrix + b * C * stride;
      if (by_output)
        std::memcpy(mix.matrix + b * O * stride, from, C * stride * sizeof(T));
      else
        pack(mix.matrix + b * C * O_padded, O_padded, matrix(from, 1, stride), C, O, O_padded);
    }
  } else if (by_output) {
    for_rows(B, O, double(C) * C, layer.a.threads,
             [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
               gemm<T>(rows, C, C, {layer.out_proj2 + first * stride, stride, 1},
                       mix.value_matrix + b * C * stride, stride,
                       mix.matrix + (b * O + first) * stride, stride);
             });
  } else {
    T *weight = memory.take<T>(C * O_padded);
    pack(weight, O_padded, matrix(layer.out_proj2, 1, stride), C, O, O_padded);
    for_rows(B, C, double(C) * O, layer.a.threads,
             [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
               gemm<T>(rows, O, C, {mix.value_matrix + b * C * stride + first, 1, stride}, weight,
                       O_padded, mix.matrix + (b * C + first) * O_padded, O_padded);
             });
  }
  return mix;
}

template <class T>
TokenGradient<T> paired_attention_mix_bwd(Layer<T> &layer, const Summary<T> &summary,
                                          const Mix<T> &mix, T *sums,
                                          const PairedAttentionGradients &grads) {
  const int64_t B = layer.B, N = layer.N, C = layer.C, H = layer.H, P = layer.P, D = layer.D;
  const int64_t J = layer.J, O = layer.O, stride = layer.C_padded, P_padded = layer.P_padded;
  const int64_t D_padded = padded<T>(D);
  const Sums<T> at(layer);
  Scratch &memory = layer.memory;
  const int threads = layer.a.threads;
  const auto take = [&](int64_t count) { return memory.take<T>(B * count); };
  const auto of = [&](int64_t b, int64_t offset) { return sums + b * at.size + offset; };

  // dmatrix gets its mean part; behind Wo2 it is the gradient of A Wvc, dvalue_matrix.
  T *dvalue_matrix = take(C * stride), *dvalue_constant = take(C);
  for_rows(B, O, C, threads, [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
    for (int64_t o = first; o < first + rows; ++o)
      add_scaled(of(b, at.dmatrix) + o * stride, of(b, at.dconstant)[o], mix.mean + b * stride,
                 stride);
  });
  for_rows(B, C, double(C) * O, threads, [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
    T *to = dvalue_matrix + (b * C + first) * stride;
    const T *dconstant = of(b, at.dconstant);
    if (!layer.concatenates()) {
      std::memcpy(to, of(b, at.dmatrix) + first * stride, rows * stride * sizeof(T));
      std::memcpy(dvalue_constant + b * C + first, dconstant + first, rows * sizeof(T));
      return;
    }
    gemm<T>(rows, C, O, {layer.out_proj2 + first, 1, stride}, of(b, at.dmatrix), stride, to,
            stride);
    for (int64_t r = 0; r < rows; ++r) {
      T total = 0;
      for (int64_t o = 0; o < O; ++o)
        total += dconstant[o] * layer.out_proj2[o * stride + first + r];
      dvalue_constant[b * C + first + r] = total;
    }
  });

  // Head by head: the channel map, the keys, and what they leave for q and k.
  T *ddots = take(C * D_padded), *dq_norm = take(C), *dk_norm = take(C);
  T *dq_total = take(C), *dk_total = take(C), *dq_mean = take(C), *dk_mean = take(C);
  T *dk_proj = take(C * P_padded);
  T *left = take(2 * C * stride); // (C, padded C) for queries, then for keys
  double *dtemperatures = memory.take<double>(2 * B * H);
  const double head_cost = double(D) * (2. * D * C + 4. * P + 3. * D * C);
  parallel_for(B * H, head_cost, threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / H, h = index % H, i = h * D, row = b * C + i;
    const T *q_mean = mix.q_mean + row, *k_mean = mix.k_mean + row;
    T *v_weight = scratch.take<T>(C * D_padded), *ddots_h = ddots + row * D_padded;
    pack(v_weight, D_padded, matrix(layer.part(2) + i * stride, 1, stride), C, D, D_padded);
    for (int64_t r = 0; r < D; ++r)
      for (int64_t j = 0; j < D; ++j)
        ddots_h[r * D_padded + j] = dvalue_constant[row + r] * layer.bias_of(2, i + j);
    gemm<T>(D, D, C, {dvalue_matrix + row * stride, stride, 1}, v_weight, D_padded, ddots_h,
            D_padded, true);
    dtemperatures[index] = channel_map_bwd(
        layer.channel_map(b, h, mix.q_norm + row, mix.k_norm + row), mix.cosine + row * D_padded,
        mix.softmax + row * D_padded, ddots_h, dq_norm + row, dk_norm + row);

    double dtemperature2 = 0;
    for (int64_t r = 0; r < D; ++r) {
      const T norm = mix.q_norm[row + r], scale = layer.temperature2[h] / norm;
      const T *dlogits = of(b, at.dlogits) + h * P_padded,
              *k_proj = mix.k_proj + (row + r) * P_padded;
      T *dkeys = of(b, at.dkeys) + (i + r) * P_padded, *to = dk_proj + (row + r) * P_padded;
      add_scaled(dkeys, q_mean[r], dlogits, P_padded);
      const double along = dot<double>(dkeys, k_proj, P);
      dtemperature2 += along / norm;
      dq_norm[row + r] += per_norm(T(along * scale), norm);
      dq_total[row + r] = dot<T>(dlogits, k_proj, P) * scale;
      for (int64_t p = 0; p < P_padded; ++p) to[p] = dkeys[p] * scale;
    }
    dtemperatures[B * H + index] = dtemperature2;

    // q_n gets ddots k_n + dq_norm q_n, and k_n gets ddots^T q_n + dk_norm k_n: centred part and
    // mean apart, so that neither cancels against the other.
    for (int64_t r = 0; r < D; ++r) {
      T q = dq_norm[row + r] * q_mean[r], k = dk_norm[row + r] * k_mean[r];
      for (int64_t j = 0; j < D; ++j) {
        q += ddots_h[r * D_padded + j] * k_mean[j];
        k += ddots_h[j * D_padded + r] * q_mean[j];
      }
      dq_mean[row + r] = q, dk_mean[row + r] = k;
      dq_total[row + r] += N * q, dk_total[row + r] = N * k;
    }
    const T *q_weight = layer.part(0) + i * stride, *k_weight = layer.part(1) + i * stride;
    T *left_q = left + (2 * b * C + i) * stride, *left_k = left_q + C * stride;
    for (int64_t r = 0; r < D; ++r)
      for (int64_t c = 0; c < stride; c += LANES<T>) {
        store(left_q + r * stride + c,
              broadcast(dq_norm[row + r]) * load(q_weight + r * stride + c));
        store(left_k + r * stride + c,
              broadcast(dk_norm[row + r]) * load(k_weight + r * stride + c));
      }
    gemm<T>(D, C, D, {ddots_h, D_padded, 1}, k_weight, stride, left_q, stride, true);
    gemm<T>(D, C, D, {ddots_h, 1, D_padded}, q_weight, stride, left_k, stride, true);
  });

  const auto write_sum = [&](void *to, int64_t count, const auto &term) {
    for (int64_t i = 0; to && i < count; ++i) {
      double total = 0;
      for (int64_t b = 0; b < B; ++b) total += term(b, i);
      static_cast<T *>(to)[i] = T(total);
    }
  };
  write_sum(grads.temperature, H, [&](int64_t b, int64_t h) { return dtemperatures[b * H + h]; });
  write_sum(grads.temperature2, H,
            [&](int64_t b, int64_t h) { return dtemperatures[(B + b) * H + h]; });
  write_sum(grads.out_proj_bias, O,
            [&](int64_t b, int64_t o) { return of(b, at.dout_proj_bias)[o]; });
  write_sum(grads.out_proj2_bias, O, [&](int64_t b, int64_t o) { return of(b, at.dconstant)[o]; });

  // qkvv: over tokens, and for keys and spatial values over projected tokens. In blocks of rows of
  // one head; the sum over samples is taken in their order.
  const int64_t blocks = row_blocks(D);
  const double weight_cost = double(B) * minimum(D, BLOCK_ROWS) * (4. * D * C + 2. * C * P);
  parallel_for(H * blocks, weight_cost, threads, [&](int64_t index, Scratch &scratch) {
    const int64_t h = index / blocks, start = index % blocks * BLOCK_ROWS, first = h * D + start;
    const int64_t rows = minimum(BLOCK_ROWS, D - start);
    T *to[4], dbias[4][BLOCK_ROWS] = {};
    for (int k = 0; k < 4; ++k) to[k] = scratch.zeros<T>(rows * stride);
    for (int64_t b = 0; b < B; ++b) {
      const int64_t head = b * C + h * D;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = first + r, row = b * C + i;
        T *dq = to[0] + r * stride, *dk = to[1] + r * stride;
        add_scaled(dq, T(1), of(b, at.dq_weight) + i * stride, stride);
        add_scaled(dq, dq_norm[row], mix.q_gram + row * stride, stride);
        add_scaled(dq, dq_total[row], mix.mean + b * stride, stride);
        add_scaled(dk, dk_norm[row], mix.k_gram + row * stride, stride);
        add_scaled(dk, dk_total[row], mix.mean + b * stride, stride);
        dbias[0][r] += dq_total[row];
        dbias[1][r] += dk_total[row];
        for (int64_t j = 0; j < D; ++j)
          dbias[2][r] +=
              mix.attention[(head + j) * D_padded + start + r] * dvalue_constant[head + j];
        if (layer.bias) {
          dbias[1][r] += dot<T>(dk_proj + row * P_padded, layer.row_sums[0], P);
          dbias[3][r] += dot<T>(of(b, at.dvalues) + i * P_padded, layer.row_sums[1], P);
        }
      }
      // ddots k_gram, ddots^T q_gram, A^T dvalue_matrix
      const T *ddots_h = ddots + head * D_padded, *attention = mix.attention + head * D_padded;
      gemm<T>(rows, C, D, {ddots_h + start * D_padded, D_padded, 1}, mix.k_gram + head * stride,
              stride, to[0], stride, true);
      gemm<T>(rows, C, D, {ddots_h + start, 1, D_padded}, mix.q_gram + head * stride, stride, to[1],
              stride, true);
      gemm<T>(rows, C, D, {attention + start, 1, D_padded}, dvalue_matrix + head * stride, stride,
              to[2], stride, true);
      const T *z_k = summary.projected + b * J * P * stride, *z_v = z_k + (J - 1) * P * stride;
      gemm<T>(rows, C, P, {dk_proj + (b * C + first) * P_padded, P_padded, 1}, z_k, stride, to[1],
              stride, true);
      gemm<T>(rows, C, P, {of(b, at.dvalues) + first * P_padded, P_padded, 1}, z_v, stride, to[3],
              stride, true);
    }
    for (int k = 0; k < 4; ++k) {
      unpack(matrix(static_cast<T *>(grads.qkvv_weight) + (k * C + first) * C, C, 1), to[k], stride,
             rows, C);
      for (int64_t r = 0; grads.qkvv_bias && r < rows; ++r)
        static_cast<T *>(grads.qkvv_bias)[k * C + first + r] = dbias[k][r];
    }
  });

  if (layer.concatenates()) {
    T *turned = take(C * stride); // A Wvc, inputs as rows
    for (int64_t b = 0; b < B; ++b)
      pack(turned + b * C * stride, stride, matrix(mix.value_matrix + b * C * stride, 1, stride), C,
           C, stride);
    for_rows(1, O, double(B) * C * C, threads,
             [&](int64_t, int64_t first, int64_t rows, Scratch &scratch) {
               T *to = scratch.zeros<T>(2 * rows * stride), *to_spatial = to + rows * stride;
               for (int64_t b = 0; b < B; ++b) {
                 gemm<T>(rows, C, C, {of(b, at.dmatrix) + first * stride, stride, 1},
                         turned + b * C * stride, stride, to, stride, true);
                 for (int64_t r = 0; r < rows; ++r) {
                   for (int64_t i = 0; i < C; ++i)
                     to[r * stride + i] +=
                         of(b, at.dconstant)[first + r] * mix.value_constant[b * C + i];
                   add_scaled(to_spatial + r * stride, T(1),
                              of(b, at.dout_proj) + (first + r) * stride, stride);
                 }
               }
               unpack(matrix(static_cast<T *>(grads.out_proj2_weight) + first * C, C, 1), to,
                      stride, rows, C);
               unpack(matrix(static_cast<T *>(grads.out_proj_weight) + first * C, C, 1), to_spatial,
                      stride, rows, C);
             });
  }

  // For the last pass.
  TokenGradient<T> gradient = {take(C * stride), take(stride), take(J * P * stride),
                               memory.zeros<T>(J * P)};
  const T *q_weight = layer.part(0), *k_weight = layer.part(1), *vs_weight = layer.part(3);
  for_rows(B, C, 2. * C * C, threads, [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
    const T *left_q = left + 2 * b * C * stride, *left_k = left_q + C * stride;
    T *to = gradient.dgram + (b * C + first) * stride;
    gemm<T>(rows, C, C, {left_q + first, 1, stride}, q_weight, stride, to, stride);
    gemm<T>(rows, C, C, {left_k + first, 1, stride}, k_weight, stride, to, stride, true);
  });
  for (int64_t b = 0; b < B; ++b) {
    gemm<T>(1, C, C, {dq_mean + b * C, 0, 1}, q_weight, stride, gradient.dtoken + b * stride,
            stride);
    gemm<T>(1, C, C, {dk_mean + b * C, 0, 1}, k_weight, stride, gradient.dtoken + b * stride,
            stride, true);
  }
  for_rows(B, P, 2. * C * C, threads, [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
    T *to_k = gradient.dprojected + (b * J * P + first) * stride,
      *to_v = to_k + (J - 1) * P * stride;
    gemm<T>(rows, C, C, {dk_proj + b * C * P_padded + first, 1, P_padded}, k_weight, stride, to_k,
            stride);
    gemm<T>(rows, C, C, {of(b, at.dvalues) + first, 1, P_padded}, vs_weight, stride, to_v, stride,
            J == 1);
  });
  T *dbiases[2] = {static_cast<T *>(grads.proj_k_bias),
                   static_cast<T *>(J == 2 ? grads.proj_v_bias : grads.proj_k_bias)};
  for (int k = 0; k < 2; ++k) {
    T *drows = gradient.drows + (J == 2 ? k * P : 0), *dbias = dbiases[k];
    for (int64_t p = 0; dbias && (k == 0 || J == 2) && p < P; ++p) dbias[p] = 0;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < C; ++i) {
        const T *row = k ? of(b, at.dvalues) + i * P_padded : dk_proj + (b * C + i) * P_padded;
        const T factor = layer.bias_of(k ? 3 : 1, i);
        for (int64_t p = 0; p < P; ++p) drows[p] += factor * row[p];
        for (int64_t p = 0; dbias && p < P; ++p) dbias[p] += row[p];
      }
  }
  return gradient;
}

#define EPA_INSTANTIATE(T)                                                                         \
  template Mix<T> paired_attention_mix_fwd(Layer<T> &, const Summary<T> &, bool);                  \
  template TokenGradient<T> paired_attention_mix_bwd(                                              \
      Layer<T> &, const Summary<T> &, const Mix<T> &, T *, const PairedAttentionGradients &)
EPA_INSTANTIATE(float);
EPA_INSTANTIATE(double);
#undef EPA_INSTANTIATE

} // namespace epa::EPA_ISA
