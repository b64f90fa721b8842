// Paired attention for few tokens (N < 2C): q, k, vc and vs in memory, no C x C algebra.
//   rows are channels h * D + d, tokens lie in the lanes, padded with zeros to whole blocks, and
//   every weight is read as it is stored: W x^T gives channels by tokens
//   fwd  qkvv -> dots, norms, k_proj, v_proj -> out_c, out_s -> y
//   bwd  the same up to k_proj, v_proj, then back; nothing is kept
#include "paired.h"

namespace epa::EPA_ISA {
namespace {

template <class T> struct Direct {
  Layer<T> &layer;
  const int64_t B, N, C, H, P, D, J, O, stride, P_padded, D_padded;
  const int64_t width; // tokens, padded to blocks
  const int threads;
  T *x;                            // (B, C, width)
  T *qkvv;                         // (B, 4, C, width)
  T *e;                            // (J, N, padded P): projections, tokens as rows
  T *q_norm, *k_norm;              // (B, C), clamped
  T *cosine, *softmax, *attention; // (B, C, padded D)
  T *k_proj, *values, *keys;       // (B, C, padded P)
  T *out_c, *out_s; // (B, C, width); out_s in the order of the layout's rows, see flat_rows

  explicit Direct(Layer<T> &l)
      : layer(l), B(l.B), N(l.N), C(l.C), H(l.H), P(l.P), D(l.D), J(l.J), O(l.O),
        stride(l.C_padded), P_padded(l.P_padded), D_padded(padded<T>(D)),
        width(round_up<int64_t>(N, BLOCK_N<T>)), threads(l.a.threads) {
    x = take(C * width), qkvv = take(4 * C * width);
    e = layer.memory.template take<T>(J * N * P_padded);
    q_norm = take(C), k_norm = take(C);
    cosine = take(C * D_padded), softmax = take(C * D_padded), attention = take(C * D_padded);
    k_proj = take(C * P_padded), values = take(C * P_padded), keys = take(C * P_padded);
    out_c = take(C * width), out_s = take(C * width);
  }

  T *take(int64_t count) { return layer.memory.template take<T>(B * count); }
  T *part(int64_t b, int k) const { return qkvv + (b * 4 + k) * C * width; }
  SpatialMap<T> spatial_map(int64_t b, int64_t i) const {
    const int64_t at = (b * C + i) * P_padded;
    return {D, P, keys + at, values + at, layer.a.spatial_threshold, layer.a.seed};
  }
  ChannelMap<T> channel_map(int64_t b, int64_t h) const {
    const int64_t at = b * C + h * D;
    return layer.channel_map(b, h, q_norm + at, k_norm + at);
  }
  bool official() const { return layer.a.layout == Layout::official; }
  // Where the rows d of a head of out_s (or its gradient) start and how far apart they are.
  int64_t head(int64_t h) const { return (official() ? layer.flat(h, 0) : h * D) * width; }
  int64_t row_stride() const { return official() ? H * width : width; }

  // f(b, first row, rows, scratch) over blocks of rows.
  template <class F>
  void for_rows(int64_t samples, int64_t rows, double cost_of_row, const F &f) const {
    const int64_t blocks = row_blocks(rows);
    parallel_for(samples * blocks, cost_of_row * BLOCK_ROWS, threads,
                 [&](int64_t index, Scratch &scratch) {
                   const int64_t first = index % blocks * BLOCK_ROWS;
                   f(index / blocks, first, minimum(BLOCK_ROWS, rows - first), scratch);
                 });
  }

  // to (rows, width) starts as bias, zero in lanes without a token.
  void fill(T *to, const T *bias, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < width; ++n) to[r * width + n] = bias && n < N ? bias[r] : T(0);
  }

  void find_maps() {
    for (int64_t j = 0; j < J; ++j)
      pack(e + j * N * P_padded, P_padded, matrix(*layer.projection[j], 1, 0, 0), N, P, P_padded);
    for_rows(B, C, double(N), [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
      const View &from = layer.a.x;
      pack(x + (b * C + first) * width, width,
           matrix(from, 2, 1, b * from.stride[0] + first * from.stride[2]), rows, N, width);
    });
    for_rows(B, 4 * C, double(N) * C, [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
      T *to = part(b, 0) + first * width;
      fill(to, layer.bias ? layer.bias + first : nullptr, rows);
      gemm<T>(rows, N, C, {layer.weight + first * stride, stride, 1}, x + b * C * width, width, to,
              width, true);
      for (int64_t i = first; i < first + rows && i < 2 * C; ++i) {
        const T *row = part(b, 0) + i * width;
        const T norm = square_root(dot<T>(row, row, width));
        T *norms = i < C ? q_norm : k_norm;
        norms[b * C + i % C] = norm < T(NORM_EPS) ? T(NORM_EPS) : norm;
      }
    });
    const double cost = double(D) * N * (D + 2 * P);
    parallel_for(B * H, cost, threads, [&](int64_t index, Scratch &scratch) {
      const int64_t b = index / H, i = index % H * D, at = b * C + i;
      const T *q = part(b, 0) + i * width, *k = part(b, 1) + i * width,
              *vs = part(b, 3) + i * width;
      T *turned = scratch.take<T>(width * D_padded), *dots = cosine + at * D_padded;
      pack(turned, D_padded, matrix(k, 1, width), N, D, D_padded);
      gemm<T>(D, D, N, {q, width, 1}, turned, D_padded, dots, D_padded);
      channel_map_fwd(channel_map(b, index % H), dots, softmax + at * D_padded,
                      attention + at * D_padded);
      for (int v = 0; v < 2; ++v) {
        T *to = (v ? values : k_proj) + at * P_padded;
        const T *bias = layer.projection_bias[v];
        for (int64_t r = 0; r < D; ++r)
          for (int64_t p = 0; p < P_padded; ++p)
            to[r * P_padded + p] = bias && p < P ? bias[p] : T(0);
        gemm<T>(D, P, N, {v ? vs : k, width, 1}, e + (v && J == 2) * N * P_padded, P_padded, to,
                P_padded, true);
      }
      for (int64_t r = 0; r < D; ++r) {
        const T scale = T(LOG2_E * layer.temperature2[index % H] / q_norm[at + r]);
        for (int64_t p = 0; p < P_padded; ++p)
          keys[(at + r) * P_padded + p] = k_proj[(at + r) * P_padded + p] * scale;
      }
    });
  }

  void find_out_c(int64_t b, int64_t h) {
    const int64_t i = h * D;
    gemm<T>(D, N, D, {attention + (b * C + i) * D_padded, D_padded, 1}, part(b, 2) + i * width,
            width, out_c + (b * C + i) * width, width);
  }

  // out_s -> out_s' with its columns as rows, and back for the gradient. Under layout "official"
  // row r of out_s' is C consecutive numbers of the flat (channel, token) order.
  T *to_rows(T *from) {
    if (!official()) return from;
    T *to = take(C * width), *dense = take(C * N);
    for_rows(B, C, double(N), [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
      unpack(matrix(dense + (b * C + first) * N, N, 1), from + (b * C + first) * width, width, rows,
             N);
    });
    for_rows(B, C, double(N), [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
      pack(to + (b * C + first) * width, width, matrix(dense + b * C * N + first, 1, C), rows, N,
           width);
    });
    return to;
  }
  T *from_rows(T *from) {
    if (!official()) return from;
    T *to = take(C * width), *dense = take(C * N);
    for_rows(B, C, double(N), [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
      unpack(matrix(dense + b * C * N + first, 1, C), from + (b * C + first) * width, width, rows,
             N);
    });
    for_rows(B, C, double(N), [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
      pack(to + (b * C + first) * width, width, matrix(dense + (b * C + first) * N, N, 1), rows, N,
           width);
    });
    return to;
  }
};

} // namespace

template <class T> void paired_attention_direct_fwd(Layer<T> &layer, const View &y) {
  Direct<T> direct(layer);
  const int64_t B = layer.B, N = layer.N, C = layer.C, H = layer.H, D = layer.D, O = layer.O;
  const int64_t width = direct.width;
  direct.find_maps();
  const double cost = double(D) * N * (D + 2. * layer.P);
  parallel_for(B * H, cost, direct.threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / H, h = index % H;
    direct.find_out_c(b, h);
    T *weights = scratch.take<T>(spatial_scratch<T>(layer.P, layer.D));
    const T *q = direct.part(b, 0) + h * D * width;
    T *out = direct.out_s + b * C * width + direct.head(h);
    for (int64_t n = 0; n < N; n += BLOCK_N<T>)
      spatial_block_fwd(direct.spatial_map(b, h * D), q + n, width, layer.map_row(b, h, n), out + n,
                        direct.row_stride(), weights);
  });
  const T *out_rows = direct.to_rows(direct.out_s);
  const bool projects = layer.concatenates();
  direct.for_rows(
      B, C, projects ? double(N) * C : N,
      [&](int64_t b, int64_t first, int64_t rows, Scratch &scratch) {
        T *to = scratch.take<T>(rows * width);
        const T *out_s = out_rows + b * C * width, *out_c = direct.out_c + b * C * width;
        const auto write = [&](int64_t begin, int64_t count) {
          unpack(matrix(y, 2, 1, b * y.stride[0] + (first + begin) * y.stride[2]),
                 to + begin * width, width, count, N);
        };
        if (!projects) {
          for (int64_t i = 0; i < rows * width; ++i)
            to[i] = out_s[first * width + i] + out_c[first * width + i];
          return write(0, rows);
        }
        // Rows before O are the spatial branch's, the others the channel branch's.
        for (int branch = 0; branch < 2; ++branch) {
          const int64_t begin = branch ? (first < O ? minimum(O - first, rows) : 0) : 0;
          const int64_t end = branch ? rows : (first < O ? minimum(O - first, rows) : 0);
          if (begin == end) continue;
          const int64_t o = first + begin - branch * O;
          const T *bias = branch ? layer.out_proj2_bias : layer.out_proj_bias;
          direct.fill(to + begin * width, bias ? bias + o : nullptr, end - begin);
          gemm<T>(
              end - begin, N, C,
              {(branch ? layer.out_proj2 : layer.out_proj) + o * layer.C_padded, layer.C_padded, 1},
              branch ? out_c : out_s, width, to + begin * width, width, true);
          write(begin, end - begin);
        }
      });
}

template <class T>
void paired_attention_direct_bwd(Layer<T> &layer, const View &dy,
                                 const PairedAttentionGradients &grads) {
  Direct<T> direct(layer);
  const int64_t B = layer.B, N = layer.N, C = layer.C, H = layer.H, P = layer.P, D = layer.D;
  const int64_t J = layer.J, O = layer.O, stride = layer.C_padded, width = direct.width;
  const int64_t P_padded = layer.P_padded, D_padded = direct.D_padded;
  const bool projects = layer.concatenates();
  direct.find_maps();

  // dy with channels as rows; behind the output projections dout_s' and dout_c.
  T *d = direct.take(C * width), *dout_c = d, *dout_rows = d;
  direct.for_rows(B, C, double(N), [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
    pack(d + (b * C + first) * width, width,
         matrix(dy, 2, 1, b * dy.stride[0] + first * dy.stride[2]), rows, N, width);
  });
  if (projects) {
    dout_c = direct.take(C * width), dout_rows = direct.take(C * width);
    direct.for_rows(B, C, 2. * N * O, [&](int64_t b, int64_t first, int64_t rows, Scratch &) {
      const T *d_s = d + b * C * width, *d_c = d_s + O * width;
      gemm<T>(rows, width, O, {layer.out_proj + first, 1, stride}, d_s, width,
              dout_rows + (b * C + first) * width, width);
      gemm<T>(rows, width, O, {layer.out_proj2 + first, 1, stride}, d_c, width,
              dout_c + (b * C + first) * width, width);
    });
  }
  T *dout_s = direct.from_rows(dout_rows);

  // Head by head, down to the gradients of q, k, vc and vs.
  T *dqkvv = direct.take(4 * C * width), *dk_proj = direct.take(C * P_padded);
  T *dvalues = direct.take(C * P_padded);
  T *e = layer.memory.template take<T>(J * P * width); // projections, as they are
  for (int64_t j = 0; j < J; ++j)
    pack(e + j * P * width, width, matrix(*layer.projection[j], 0, 1, 0), P, N, width);
  double *dtemperatures = layer.memory.template take<double>(2 * B * H);
  const double cost = double(D) * N * (5. * D + 8. * P);
  parallel_for(B * H, cost, direct.threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / H, h = index % H, i = h * D, at = b * C + i;
    const T *q = direct.part(b, 0) + i * width, *k = direct.part(b, 1) + i * width;
    const T *vc = direct.part(b, 2) + i * width, *d_c = dout_c + at * width;
    T *dq = dqkvv + (b * 4 * C + i) * width, *dk = dq + C * width, *dvc = dk + C * width;
    T *dvs = dvc + C * width;
    direct.find_out_c(b, h);

    // Spatial branch.
    T *dkeys = dk_proj + at * P_padded, *dvalues_h = dvalues + at * P_padded;
    std::memset(dkeys, 0, D * P_padded * sizeof(T));
    std::memset(dvalues_h, 0, D * P_padded * sizeof(T));
    const SpatialSums<T> sums = {dkeys, dvalues_h, scratch.zeros<T>(P_padded)};
    T *weights = scratch.take<T>(spatial_scratch<T>(P, D));
    const int64_t head = b * C * width + direct.head(h);
    for (int64_t n = 0; n < N; n += BLOCK_N<T>)
      spatial_block_bwd(direct.spatial_map(b, i), q + n, q + n, width, layer.map_row(b, h, n),
                        dout_s + head + n, direct.row_stride(), direct.out_s + head + n,
                        direct.row_stride(), dq + n, width, sums, weights);

    // Channel branch.
    T *turned = scratch.take<T>(width * D_padded), *ddots = scratch.take<T>(D * D_padded);
    T *dq_norm = scratch.take<T>(D), *dk_norm = scratch.take<T>(D);
    pack(turned, D_padded, matrix(vc, 1, width), N, D, D_padded);
    gemm<T>(D, D, N, {d_c, width, 1}, turned, D_padded, ddots, D_padded);
    dtemperatures[index] = channel_map_bwd(direct.channel_map(b, h), direct.cosine + at * D_padded,
                                           direct.softmax + at * D_padded, ddots, dq_norm, dk_norm);

    double dtemperature2 = 0;
    for (int64_t r = 0; r < D; ++r) {
      const T norm = direct.q_norm[at + r], scale = layer.temperature2[h] / norm;
      const double along =
          dot<double>(dkeys + r * P_padded, direct.k_proj + (at + r) * P_padded, P);
      dtemperature2 += along / norm;
      dq_norm[r] += per_norm(T(along * scale), norm);
      for (int64_t p = 0; p < P_padded; ++p) dkeys[r * P_padded + p] *= scale;
      for (int64_t n = 0; n < width; n += LANES<T>) {
        T *to = dq + r * width + n;
        store(to, load(to) + broadcast(dq_norm[r]) * load(q + r * width + n));
        store(dk + r * width + n, broadcast(dk_norm[r]) * load(k + r * width + n));
      }
    }
    dtemperatures[B * H + index] = dtemperature2;
    gemm<T>(D, N, D, {ddots, D_padded, 1}, k, width, dq, width, true);
    gemm<T>(D, N, D, {ddots, 1, D_padded}, q, width, dk, width, true);
    gemm<T>(D, N, D, {direct.attention + at * D_padded, 1, D_padded}, d_c, width, dvc, width);
    gemm<T>(D, N, P, {dkeys, P_padded, 1}, e, width, dk, width, true);
    gemm<T>(D, N, P, {dvalues_h, P_padded, 1}, e + (J - 1) * P * width, width, dvs, width);
  });
  const auto write_sum = [&](void *to, const double *terms) {
    for (int64_t h = 0; h < H; ++h) {
      double total = 0;
      for (int64_t b = 0; b < B; ++b) total += terms[b * H + h];
      static_cast<T *>(to)[h] = T(total);
    }
  };
  write_sum(grads.temperature, dtemperatures);
  write_sum(grads.temperature2, dtemperatures + B * H);

  // x, and the weights: sums over samples in their order.
  direct.for_rows(B, C, 4. * C * N, [&](int64_t b, int64_t first, int64_t rows, Scratch &scratch) {
    T *dx = scratch.take<T>(rows * width);
    gemm<T>(rows, N, 4 * C, {layer.weight + first, 1, stride}, dqkvv + b * 4 * C * width, width, dx,
            width);
    const View &to = grads.x;
    unpack(matrix(to, 2, 1, b * to.stride[0] + first * to.stride[2]), dx, width, rows, N);
  });
  T *x_rows = direct.take(N * stride);
  for (int64_t b = 0; b < B; ++b)
    pack(x_rows + b * N * stride, stride, layer.tokens(layer.a.x, b, 0), N, C, stride);
  const auto write_weight = [&](void *weight, void *bias, int64_t rows, const T *left,
                                int64_t left_size, const T *right) {
    direct.for_rows(1, rows, double(B) * N * C,
                    [&](int64_t, int64_t first, int64_t count, Scratch &scratch) {
                      // Straight into the gradient where its rows are whole vectors.
                      T *rows_of_weight = static_cast<T *>(weight) + first * C;
                      T *to = C == stride ? rows_of_weight : scratch.take<T>(count * stride);
                      for (int64_t b = 0; b < B; ++b)
                        gemm<T>(count, C, N, {left + b * left_size + first * width, width, 1},
                                right + b * N * stride, stride, to, stride, b > 0);
                      if (to != rows_of_weight)
                        unpack(matrix(rows_of_weight, C, 1), to, stride, count, C);
                      for (int64_t r = 0; bias && r < count; ++r) {
                        T total = 0;
                        for (int64_t b = 0; b < B; ++b) {
                          Vector<T> lanes = {};
                          const T *row = left + b * left_size + (first + r) * width;
                          for (int64_t n = 0; n < N; n += LANES<T>) lanes += load(row + n);
                          total += sum<T>(lanes);
                        }
                        static_cast<T *>(bias)[first + r] = total;
                      }
                    });
  };
  write_weight(grads.qkvv_weight, grads.qkvv_bias, 4 * C, dqkvv, 4 * C * width, x_rows);
  if (projects) {
    const T *out_rows = direct.to_rows(direct.out_s);
    T *rows = direct.take(N * stride);
    for (int branch = 0; branch < 2; ++branch) {
      const T *out = branch ? direct.out_c : out_rows;
      for (int64_t b = 0; b < B; ++b)
        pack(rows + b * N * stride, stride, matrix(out + b * C * width, 1, width), N, C, stride);
      write_weight(branch ? grads.out_proj2_weight : grads.out_proj_weight,
                   branch ? grads.out_proj2_bias : grads.out_proj_bias, O, d + branch * O * width,
                   C * width, rows);
    }
  }

  direct.for_rows(1, P, 2. * B * C * N,
                  [&](int64_t, int64_t first, int64_t rows, Scratch &scratch) {
                    for (int64_t j = 0; j < J; ++j) {
                      T *to = scratch.zeros<T>(rows * width);
                      const View &view = j ? grads.proj_v_weight : grads.proj_k_weight;
                      T *dbias = static_cast<T *>(j ? grads.proj_v_bias : grads.proj_k_bias);
                      for (int64_t r = 0; dbias && r < rows; ++r) dbias[first + r] = 0;
                      for (int64_t b = 0; b < B; ++b)
                        for (int v = 0; v < 2; ++v) {
                          if (J == 2 && v != j) continue;
                          const T *dproj = (v ? dvalues : dk_proj) + b * C * P_padded + first;
                          gemm<T>(rows, N, C, {dproj, 1, P_padded}, direct.part(b, v ? 3 : 1),
                                  width, to, width, true);
                          for (int64_t i = 0; dbias && i < C; ++i)
                            for (int64_t r = 0; r < rows; ++r)
                              dbias[first + r] += dproj[i * P_padded + r];
                        }
                      unpack(matrix(view, 0, 1, first * view.stride[0]), to, width, rows, N);
                    }
                  });
}

#define EPA_INSTANTIATE(T)                                                                         \
  template void paired_attention_direct_fwd(Layer<T> &, const View &);                             \
  template void paired_attention_direct_bwd(Layer<T> &, const View &,                              \
                                            const PairedAttentionGradients &)
EPA_INSTANTIATE(float);
EPA_INSTANTIATE(double);
#undef EPA_INSTANTIATE

} // namespace epa::EPA_ISA
