// Paired attention: what its parts share. The reference is reference.paired_attention, the form and
// the names below are those of two_pass.py.
//
//   paired_summary.cpp   over tokens: mean, gram, projected; and last in backward: dx, dprojections
//   paired_mix.cpp       between the passes, nothing of size N
//   paired_output.cpp    over tokens: q, spatial softmax, y; and in backward all sums over tokens
//   paired_direct.cpp    the other plan, for few tokens
//
// Rows of small matrices are padded to whole vectors. Channels go head by head, i = h * D + d.
#pragma once
#include "tile.h"

namespace epa::EPA_ISA {

// Rows that one step of a loop over the rows of a product takes.
constexpr int64_t BLOCK_ROWS = 32;
static inline int64_t row_blocks(int64_t rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }

// One call: sizes, weights with padded rows, and memory that lives as long as the call.
template <class T> struct Layer {
  const PairedAttention &a;
  const int64_t B, N, C, H, P, D, J, O; // J projections; O columns of each branch's output
  const int64_t C_padded, P_padded, O_padded;
  Scratch memory;
  const T *weight, *bias;                  // (4C, padded C), (4C) or null
  const T *out_proj, *out_proj2;           // (O, padded C) or null
  const T *out_proj_bias, *out_proj2_bias; // (O) or null
  const T *temperature, *temperature2;     // (H)
  const T *projection_bias[2];             // (P) or null, of keys and values
  const View *projection[2];               // (P, N), of keys and values
  const T *row_sums[2];                    // (P): sum_n E[p,n]; null without qkvv bias

  explicit Layer(const PairedAttention &arguments)
      : a(arguments), B(a.B), N(a.N), C(a.C), H(a.H), P(a.P), D(C / H),
        J(a.kind == Kind::split ? 2 : 1), O(a.kind == Kind::sum ? C : C / 2),
        C_padded(padded<T>(C)), P_padded(padded<T>(P)), O_padded(padded<T>(O)),
        weight(rows(a.qkvv_weight, 4 * C)), bias(static_cast<const T *>(a.qkvv_bias)),
        out_proj(rows(a.out_proj_weight, O)), out_proj2(rows(a.out_proj2_weight, O)),
        out_proj_bias(static_cast<const T *>(a.out_proj_bias)),
        out_proj2_bias(static_cast<const T *>(a.out_proj2_bias)),
        temperature(static_cast<const T *>(a.temperature)),
        temperature2(static_cast<const T *>(a.temperature2)) {
    const void *biases[2] = {a.proj_k_bias, J == 2 ? a.proj_v_bias : a.proj_k_bias};
    for (int k = 0; k < 2; ++k) {
      projection[k] = k && J == 2 ? &a.proj_v_weight : &a.proj_k_weight;
      projection_bias[k] = static_cast<const T *>(biases[k]);
      row_sums[k] = !bias ? nullptr : k && J == 1 ? row_sums[0] : find_row_sums(*projection[k]);
    }
  }

  bool concatenates() const { return a.kind != Kind::sum; }
  const T *part(int k) const { return weight + k * C * C_padded; } // q, k, v channel, v spatial
  T bias_of(int k, int64_t i) const { return bias ? bias[k * C + i] : T(0); }

  // A matrix of C columns with padded rows: itself where its rows are whole vectors.
  const T *rows(const void *data, int64_t count) {
    const T *dense = static_cast<const T *>(data);
    if (!dense || C == C_padded) return dense;
    T *copy = memory.take<T>(count * C_padded);
    pack(copy, C_padded, matrix(dense, C, 1), count, C, C_padded);
    return copy;
  }

  // A channel's place in the flat (.., N) order of the spatial branch's result.
  int64_t flat(int64_t h, int64_t d) const { return d * H + h; }
  int64_t map_row(int64_t b, int64_t h, int64_t n) const { return (b * H + h) * N + n; }
  ChannelMap<T> channel_map(int64_t b, int64_t h, const T *q_norm, const T *k_norm) const {
    return {D,
            padded<T>(D),
            q_norm,
            k_norm,
            temperature[h],
            a.channel_threshold,
            a.seed,
            static_cast<uint64_t>(b * C + h * D)};
  }

  // From token n on: tokens as rows, channels as columns; and rows p of a projection.
  Matrix tokens(const View &view, int64_t b, int64_t n, int64_t channel = 0) const {
    return matrix(view, 1, 2, b * view.stride[0] + n * view.stride[1] + channel * view.stride[2]);
  }
  Matrix dense_tokens(T *data, int64_t b, int64_t n) const {
    return matrix(data + (b * N + n) * C, C, 1);
  }
  Matrix projection_tile(const View &view, int64_t n) const {
    return matrix(view, 0, 1, n * view.stride[1]);
  }

private:
  const T *find_row_sums(const View &projection) {
    T *sums = memory.take<T>(P);
    parallel_for((P + 7) / 8, 8. * N, a.threads, [&](int64_t block, Scratch &scratch) {
      const int64_t p = block * 8, count = minimum<int64_t>(8, P - p);
      T *tile = scratch.take<T>(8 * TILE_N);
      Vector<T> totals[8] = {};
      for (int64_t n = 0; n < N; n += TILE_N) {
        const int64_t columns = minimum(TILE_N, N - n);
        pack(tile, TILE_N,
             matrix(projection, 0, 1, p * projection.stride[0] + n * projection.stride[1]), count,
             columns, padded<T>(columns));
        for (int64_t i = 0; i < count; ++i)
          for (int64_t c = 0; c < columns; c += LANES<T>) totals[i] += load(tile + i * TILE_N + c);
      }
      for (int64_t i = 0; i < count; ++i) sums[p + i] = sum<T>(totals[i]);
    });
    return sums;
  }
};

// What the first pass leaves, padded; kept for backward in the caller's memory.
template <class T> struct Summary {
  const double *mean; // (B, C)
  const T *gram;      // (B, C, padded C)
  const T *projected; // (B, J, P, padded C)
};
template <class T> void paired_attention_summary_fwd(Layer<T> &layer);
template <class T> Summary<T> kept_summary(Layer<T> &layer);

// Between the passes. C rows a sample, head by head.
template <class T> struct Mix {
  T *mean;                          // (B, padded C)
  T *q_mean, *k_mean;               // (B, C)
  T *q_norm, *k_norm;               // (B, C), clamped
  T *q_gram, *k_gram;               // (B, C, padded C): Wq M, Wk M
  T *k_proj, *values;               // (B, C, padded P): k_proj, v_proj with channels as rows
  T *keys;                          // (B, C, padded P): k_proj temperature2 log2(e) / |q|
  T *cosine, *softmax, *attention;  // (B, C, padded D)
  T *value_matrix, *value_constant; // (B, C, padded C), (B, C): A Wvc, A bvc
  T *matrix;                        // the channel branch: (B, C, padded O), or (B, O, padded C)
  T *constant;                      // (B, padded O)
};
// With by_output the matrix has outputs as rows, as backward wants it, else inputs.
template <class T>
Mix<T> paired_attention_mix_fwd(Layer<T> &layer, const Summary<T> &summary, bool by_output);

template <class T>
void paired_attention_output_fwd(Layer<T> &layer, const Mix<T> &mix, const View &y);

// Sums over tokens of one sample, in this order behind each other.
template <class T> struct Sums {
  int64_t dmatrix, dq_weight, dout_proj, dkeys, dvalues, dlogits, dconstant, dout_proj_bias, size;
  explicit Sums(const Layer<T> &layer) {
    int64_t end = 0;
    const auto next = [&](int64_t count) { return end += count, end - count; };
    const bool projects = layer.concatenates();
    dmatrix = next(layer.O * layer.C_padded);
    dq_weight = next(layer.C * layer.C_padded);
    dout_proj = next(projects ? layer.O * layer.C_padded : 0);
    dkeys = next(layer.C * layer.P_padded);
    dvalues = next(layer.C * layer.P_padded);
    dlogits = next(layer.H * layer.P_padded);
    dconstant = next(layer.O_padded);
    dout_proj_bias = next(projects ? layer.O_padded : 0);
    size = end;
  }
};
// Returns the sums (B, Sums.size); dx_partial (B, N, C) gets what comes through q and the matrix.
template <class T>
T *paired_attention_output_bwd(Layer<T> &layer, const Mix<T> &mix, const View &dy, T *dx_partial);

// What the last pass needs: token x gets (x - mean) dgram + dtoken + E^T dprojected.
template <class T> struct TokenGradient {
  T *dgram;      // (B, C, padded C)
  T *dtoken;     // (B, padded C)
  T *dprojected; // (B, J, P, padded C)
  T *drows;      // (J, P): added to row p of a projection's gradient
};
template <class T>
TokenGradient<T> paired_attention_mix_bwd(Layer<T> &layer, const Summary<T> &summary,
                                          const Mix<T> &mix, T *sums,
                                          const PairedAttentionGradients &grads);

template <class T>
void paired_attention_summary_bwd(Layer<T> &layer, const Mix<T> &mix,
                                  const TokenGradient<T> &gradient, T *dx_partial,
                                  const PairedAttentionGradients &grads);

template <class T> void paired_attention_direct_fwd(Layer<T> &layer, const View &y);
template <class T>
void paired_attention_direct_bwd(Layer<T> &layer, const View &dy,
                                 const PairedAttentionGradients &grads);

} // namespace epa::EPA_ISA
