// Tiles in and out of tensors, and the two softmaxes; see tile.h.
#include "tile.h"

namespace epa::EPA_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};
#ifdef EPA_FLOAT16
typedef EPA_FLOAT16 Float16;
#endif

// As many elements of a storage type as a vector of T has lanes, wherever they lie.
template <class S, class T> struct Stored {
  typedef S type __attribute__((vector_size(LANES<T> * sizeof(S)), aligned(sizeof(S)), may_alias));
};

// Overloads, no templates: those would be tried on the two types below, which have no vectors.
float widen(float x) { return x; }
double widen(double x) { return x; }
Vector<float> load_wide(const float *p) { return load(p); }
Vector<double> load_wide(const double *p) { return load(p); }
void store_narrow(float *p, Vector<float> v) { store(p, v); }
void store_narrow(double *p, Vector<double> v) { store(p, v); }
void store_narrow(float *p, float x) { *p = x; }
void store_narrow(double *p, double x) { *p = x; }

float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
Vector<float> load_wide(const BFloat16 *p) {
  const auto bits = *reinterpret_cast<const typename Stored<uint16_t, float>::type *>(p);
  return (Vector<float>)(__builtin_convertvector(bits, Vector<uint32_t>) << 16);
}
void store_narrow(BFloat16 *p, Vector<float> v) {
  const Vector<uint32_t> bits = (Vector<uint32_t>)v;
  // To nearest, ties to even; a NaN stays one.
  const Vector<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Vector<uint32_t> chosen = v == v ? rounded : ((bits >> 16) | 0x40);
  typedef typename Stored<uint16_t, float>::type Bits;
  *reinterpret_cast<Bits *>(p) = __builtin_convertvector(chosen, Bits);
}
void store_narrow(BFloat16 *p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  p->bits = static_cast<uint16_t>(x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
                                         : (bits >> 16) | 0x40);
}

#ifdef EPA_FLOAT16
float widen(Float16 x) { return static_cast<float>(x); }
Vector<float> load_wide(const Float16 *p) {
  const auto stored = *reinterpret_cast<const typename Stored<Float16, float>::type *>(p);
  return __builtin_convertvector(stored, Vector<float>);
}
void store_narrow(Float16 *p, Vector<float> v) {
  typedef typename Stored<Float16, float>::type Halves;
  *reinterpret_cast<Halves *>(p) = __builtin_convertvector(v, Halves);
}
void store_narrow(Float16 *p, float x) { *p = static_cast<Float16>(x); }
#endif

template <class S, class T>
void pack_from(T *to, int64_t stride, const S *from, int64_t row, int64_t column, int64_t rows,
               int64_t columns, int64_t width) {
  constexpr int W = LANES<T>;
  int64_t r = 0;
  if (row == 1 && column != 1) {
    for (; r + W <= rows; r += W) {
      int64_t c = 0;
      for (; c + W <= columns; c += W) {
        Vector<T> square[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) square[i] = load_wide(from + r + (c + i) * column);
        transpose_square<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(to + (r + i) * stride + c, square[i]);
      }
      for (; c < columns; ++c)
        for (int i = 0; i < W; ++i) to[(r + i) * stride + c] = widen(from[r + i + c * column]);
      for (; c < width; ++c)
        for (int i = 0; i < W; ++i) to[(r + i) * stride + c] = 0;
    }
  }
  for (; r < rows; ++r) {
    int64_t c = 0;
    if (column == 1)
      for (; c + W <= columns; c += W) store(to + r * stride + c, load_wide(from + r * row + c));
    for (; c < columns; ++c) to[r * stride + c] = widen(from[r * row + c * column]);
    for (; c < width; ++c) to[r * stride + c] = 0;
  }
}

template <class S, class T>
void unpack_to(S *to, int64_t row, int64_t column, const T *from, int64_t stride, int64_t rows,
               int64_t columns) {
  constexpr int W = LANES<T>;
  int64_t r = 0;
  if (row == 1 && column != 1) {
    for (; r + W <= rows; r += W) {
      int64_t c = 0;
      for (; c + W <= columns; c += W) {
        Vector<T> square[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) square[i] = load(from + (r + i) * stride + c);
        transpose_square<T>(square);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store_narrow(to + r + (c + i) * column, square[i]);
      }
      for (; c < columns; ++c)
        for (int i = 0; i < W; ++i)
          store_narrow(to + r + i + c * column, from[(r + i) * stride + c]);
    }
  }
  for (; r < rows; ++r) {
    int64_t c = 0;
    if (column == 1)
      for (; c + W <= columns; c += W) store_narrow(to + r * row + c, load(from + r * stride + c));
    for (; c < columns; ++c) store_narrow(to + r * row + c * column, from[r * stride + c]);
  }
}

// Dropout bits of a block of tokens and one group of columns: two columns in the halves of a word.
template <class T> struct Bits {
  uint32_t words[COLUMNS_PER_COUNTER / 2][BLOCK_N<T>];
};

// Even tokens in one vector of 64-bit lanes, odd ones in another: a product needs a lane's width.
template <class T> Bits<T> random_bits(uint64_t seed, uint64_t row, uint32_t group, uint32_t map) {
  typedef Vector<uint64_t> V;
  constexpr int W = LANES<uint64_t>;
  const V low = V{} + 0xffffffffu, m0 = V{} + PHILOX_M0, m1 = V{} + PHILOX_M1;
  V lane;
  for (int i = 0; i < W; ++i) lane[i] = 2 * i;
  Bits<T> bits;
  for (int64_t n = 0; n < BLOCK_N<T>; n += 2 * W) {
    V word[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      const V rows = lane + (row + n + odd);
      word[odd][0] = V{} + group, word[odd][1] = rows, word[odd][2] = rows >> 32,
      word[odd][3] = V{} + map;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += PHILOX_W0, k1 += PHILOX_W1)
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        // Upper halves of lanes hold leftovers of products; no step reads them.
        V *c = word[odd];
        const V product0 = multiply_halves(c[0], m0), product1 = multiply_halves(c[2], m1);
        c[0] = (product1 >> 32) ^ c[1] ^ (V{} + k0), c[1] = product1;
        c[2] = (product0 >> 32) ^ c[3] ^ (V{} + k1), c[3] = product0;
      }
    for (int i = 0; i < 4; ++i) {
      const V both = (word[0][i] & low) | (word[1][i] << 32);
      std::memcpy(&bits.words[i][n], &both, sizeof both);
    }
  }
  return bits;
}

// Lanes of the block's vector v that `column` (of eight) keeps: all bits set, else none.
template <class T>
IntegerVector<T> kept(const Bits<T> &bits, int column, int v, uint32_t threshold) {
  constexpr int W = LANES<T>;
  const uint32_t *words = bits.words[column / 2] + v * W;
  // The column's half at the upper end of its word, where the other one decides nothing.
  const int shift = column % 2 ? 0 : 16;
  if constexpr (sizeof(T) == 4)
    return (IntegerVector<T>)((load(words) << shift) >= (Vector<uint32_t>{} + (threshold << 16)));
  IntegerVector<T> keeps;
  for (int i = 0; i < W; ++i) keeps[i] = words[i] << shift >= threshold << 16 ? -1 : 0;
  return keeps;
}

// Sums over p in four parts, which round less than one and do not wait for each other.
template <class T> struct LaneSums {
  Vector<T> parts[4][GEMM_VECTORS] = {};
  void add(int64_t p, int v, Vector<T> x) { parts[p % 4][v] += x; }
  Vector<T> total(int v) const { return (parts[0][v] + parts[1][v]) + (parts[2][v] + parts[3][v]); }
};

// f(p, v, address) for every p and every vector v of the block.
template <class T, class F> void for_block(int64_t P, T *weights, const F &f) {
  constexpr int W = LANES<T>;
  constexpr int64_t N = BLOCK_N<T>;
  int64_t p = 0;
  for (; p + 4 <= P; p += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < GEMM_VECTORS; ++v) f(i, v, weights + (p + i) * N + v * W);
  for (; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < GEMM_VECTORS; ++v) f(0, v, weights + p * N + v * W);
}

// Logits of a block become exp(logit - maximum), before dropout; 1 / their sum over p in inverse.
template <class T> void exponentials(int64_t P, T *weights, Vector<T> *inverse) {
  Vector<T> largest[GEMM_VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < GEMM_VECTORS; ++v) largest[v] = load(weights + v * LANES<T>);
  for_block(P, weights, [&](int, int v, T *at) { largest[v] = maximum(load(at), largest[v]); });
  LaneSums<T> sums;
  for_block(P, weights, [&](int part, int v, T *at) {
    const Vector<T> e = exp2<T>(load(at) - largest[v]);
    sums.add(part, v, e);
    store(at, e);
  });
#pragma GCC unroll 4
  for (int v = 0; v < GEMM_VECTORS; ++v) inverse[v] = broadcast(T(1)) / sums.total(v);
}

// to = from where dropout keeps it, else 0.
template <class T> void drop(const SpatialMap<T> &map, int64_t row, T *to, const T *from) {
  constexpr int W = LANES<T>;
  constexpr int64_t N = BLOCK_N<T>;
  for (int64_t p0 = 0; p0 < map.P; p0 += COLUMNS_PER_COUNTER) {
    const Bits<T> bits =
        random_bits<T>(map.seed, row, static_cast<uint32_t>(p0 / COLUMNS_PER_COUNTER), SPATIAL_MAP);
    const int columns = static_cast<int>(minimum<int64_t>(COLUMNS_PER_COUNTER, map.P - p0));
    for (int column = 0; column < columns; ++column)
#pragma GCC unroll 4
      for (int v = 0; v < GEMM_VECTORS; ++v) {
        const int64_t at = (p0 + column) * N + v * W;
        store(to + at, kept<T>(bits, column, v, map.threshold) ? load(from + at) : Vector<T>{});
      }
  }
}

// to (rows, BLOCK_N) = from * factor, lane by lane.
template <class T>
void scale_rows(T *to, int64_t to_stride, const T *from, int64_t from_stride, int64_t rows,
                const Vector<T> *factor) {
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < GEMM_VECTORS; ++v)
      store(to + r * to_stride + v * LANES<T>,
            load(from + r * from_stride + v * LANES<T>) * factor[v]);
}

// Row i of a head's channel map, times the multipliers of dropout.
template <class T> void drop_row(const ChannelMap<T> &map, int64_t i, T *row) {
  if (!map.threshold) return;
  const T scale = T(dropout_scale(map.threshold));
  uint16_t halves[COLUMNS_PER_COUNTER];
  for (int64_t j = 0; j < map.D; ++j) {
    const uint32_t group = static_cast<uint32_t>(j / COLUMNS_PER_COUNTER);
    if (j % COLUMNS_PER_COUNTER == 0) philox(map.seed, map.row + i, group, CHANNEL_MAP, halves);
    row[j] *= halves[j % COLUMNS_PER_COUNTER] >= map.threshold ? scale : T(0);
  }
}

} // namespace

template <class T>
void pack(T *to, int64_t stride, const Matrix &from, int64_t rows, int64_t columns, int64_t width) {
  const auto run = [&](auto *data) {
    pack_from(to, stride, data, from.row, from.column, rows, columns, width);
  };
  if constexpr (sizeof(T) == 8) {
    run(static_cast<const double *>(from.data));
  } else {
    if (from.dtype == Dtype::float32) run(static_cast<const float *>(from.data));
    if (from.dtype == Dtype::bfloat16) run(static_cast<const BFloat16 *>(from.data));
#ifdef EPA_FLOAT16
    if (from.dtype == Dtype::float16) run(static_cast<const Float16 *>(from.data));
#endif
  }
}

template <class T>
void unpack(const Matrix &to, const T *from, int64_t stride, int64_t rows, int64_t columns) {
  const auto run = [&](auto *data) {
    unpack_to(data, to.row, to.column, from, stride, rows, columns);
  };
  if constexpr (sizeof(T) == 8) {
    run(static_cast<double *>(to.data));
  } else {
    if (to.dtype == Dtype::float32) run(static_cast<float *>(to.data));
    if (to.dtype == Dtype::bfloat16) run(static_cast<BFloat16 *>(to.data));
#ifdef EPA_FLOAT16
    if (to.dtype == Dtype::float16) run(static_cast<Float16 *>(to.data));
#endif
  }
}

template <class T>
void transpose(T *to, int64_t to_stride, const T *from, int64_t from_stride, int64_t rows,
               int64_t columns) {
  constexpr int W = LANES<T>;
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < columns; c += W) {
      Vector<T> square[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) square[i] = load(from + (r + i) * from_stride + c);
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(to + (c + i) * to_stride + r, square[i]);
    }
}

template <class T> void softmax_rows(T *weights, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int W = LANES<T>;
  for (int64_t r = 0; r < rows; ++r) {
    T *row = weights + r * stride;
    T largest = row[0];
    for (int64_t c = 1; c < columns; ++c) largest = row[c] > largest ? row[c] : largest;
    Vector<T> lanes = {};
    for (int64_t c = 0; c < columns; c += W) {
      const Vector<T> e = exp2<T>((load(row + c) - broadcast(largest)) * broadcast(T(LOG2_E)));
      store(row + c, e);
      if (c + W <= columns) lanes += e;
    }
    T total = sum<T>(lanes);
    for (int64_t c = columns / W * W; c < columns; ++c) total += row[c];
    for (int64_t c = 0; c < columns; ++c) row[c] /= total;
  }
}

template <class T>
void spatial_block_fwd(const SpatialMap<T> &map, const T *q, int64_t q_stride, int64_t row, T *out,
                       int64_t out_stride, T *weights) {
  constexpr int64_t N = BLOCK_N<T>;
  const int64_t D = map.D, P = map.P, stride = padded<T>(P);
  gemm<T>(P, N, D, {map.keys, 1, stride}, q, q_stride, weights, N);
  Vector<T> inverse[GEMM_VECTORS];
  exponentials(P, weights, inverse);
  if (map.threshold) {
    drop(map, row, weights, weights);
    for (Vector<T> &v : inverse) v *= broadcast(T(dropout_scale(map.threshold)));
  }
  gemm<T>(D, N, P, {map.values, stride, 1}, weights, N, out, out_stride);
  scale_rows(out, out_stride, out, out_stride, D, inverse);
}

// With e the exponentials, s = 1 / sum e, and kept, scale those of dropout:
//   softmax = e s,  attention = kept e s scale,  dsoftmax = kept (values dout scale)
//   dlogits = e s (dsoftmax - delta),  delta = s sum_p e dsoftmax
// s and scale go to the D rows of dout and out, not to the P rows of e.
template <class T>
void spatial_block_bwd(const SpatialMap<T> &map, const T *q, const T *q_centred, int64_t q_stride,
                       int64_t row, const T *dout, int64_t dout_stride, T *out, int64_t out_stride,
                       T *dq, int64_t dq_stride, SpatialSums<T> sums, T *scratch) {
  constexpr int W = LANES<T>;
  constexpr int64_t N = BLOCK_N<T>;
  const int64_t D = map.D, P = map.P, stride = padded<T>(P);
  T *e = scratch, *dlogits = e + stride * N, *turned = dlogits + stride * N;
  T *scaled_dout = turned + stride * N;
  T *kept_e = map.threshold ? scaled_dout + D * N : e;
  gemm<T>(P, N, D, {map.keys, 1, stride}, q, q_stride, e, N);
  Vector<T> inverse[GEMM_VECTORS], scale[GEMM_VECTORS], both[GEMM_VECTORS];
  exponentials(P, e, inverse);
  if (map.threshold) drop(map, row, kept_e, e);
  for (int v = 0; v < GEMM_VECTORS; ++v) {
    scale[v] = broadcast(T(dropout_scale(map.threshold)));
    both[v] = inverse[v] * scale[v];
  }
  gemm<T>(D, N, P, {map.values, stride, 1}, kept_e, N, out, out_stride);
  scale_rows(out, out_stride, out, out_stride, D, both);

  // delta is summed over p, not taken as dout . out: rounded like this, the dlogits of a token add
  // up to zero.
  scale_rows(scaled_dout, N, dout, dout_stride, D, scale);
  gemm<T>(P, N, D, {map.values, 1, stride}, scaled_dout, N, dlogits, N);
  LaneSums<T> products;
  for_block(P, dlogits, [&](int part, int v, T *at) {
    Vector<T> dsoftmax = load(at);
    if (map.threshold) {
      dsoftmax = load(kept_e + (at - dlogits)) != Vector<T>{} ? dsoftmax : Vector<T>{};
      store(at, dsoftmax);
    }
    products.add(part, v, load(e + (at - dlogits)) * dsoftmax);
  });
  Vector<T> delta[GEMM_VECTORS];
  for (int v = 0; v < GEMM_VECTORS; ++v) delta[v] = products.total(v) * inverse[v];
  for_block(P, dlogits, [&](int, int v, T *at) {
    store(at, load(e + (at - dlogits)) * inverse[v] * (load(at) - delta[v]));
  });

  // Sums over tokens want the columns p in the lanes.
  scale_rows(scaled_dout, N, dout, dout_stride, D, both);
  transpose(turned, stride, kept_e, N, P, N);
  gemm<T>(D, P, N, {scaled_dout, N, 1}, turned, stride, sums.dvalues, stride, true);
  transpose(turned, stride, dlogits, N, P, N);
  gemm<T>(D, P, N, {q_centred, q_stride, 1}, turned, stride, sums.dkeys, stride, true);
  for (int64_t p = 0; p < P; p += W) {
    const Vector<T> total = sum_of<T>(N, [&](int64_t n) { return load(turned + n * stride + p); });
    store(sums.dlogits + p, load(sums.dlogits + p) + total);
  }

  // keys hold log2(e), which is no part of the logit's derivative.
  gemm<T>(D, N, P, {map.keys, stride, 1}, dlogits, N, dq, dq_stride);
  for (Vector<T> &v : scale) v = broadcast(T(LN_2));
  scale_rows(dq, dq_stride, dq, dq_stride, D, scale);
}

template <class T>
void channel_map_fwd(const ChannelMap<T> &map, T *dots, T *softmax, T *attention) {
  const int64_t D = map.D, stride = map.stride;
  for (int64_t i = 0; i < D; ++i)
    for (int64_t j = 0; j < D; ++j) {
      const int64_t at = i * stride + j;
      dots[at] /= map.q_norm[i] * map.k_norm[j];
      softmax[at] = map.temperature * dots[at];
    }
  softmax_rows(softmax, stride, D, D);
  for (int64_t i = 0; i < D; ++i) {
    T *row = attention + i * stride;
    std::memcpy(row, softmax + i * stride, D * sizeof(T));
    drop_row(map, i, row);
  }
}

template <class T>
double channel_map_bwd(const ChannelMap<T> &map, const T *cosine, const T *softmax, T *dattention,
                       T *dq_norm, T *dk_norm) {
  const int64_t D = map.D, stride = map.stride;
  double dtemperature = 0;
  for (int64_t j = 0; j < D; ++j) dk_norm[j] = 0;
  for (int64_t i = 0; i < D; ++i) {
    T *row = dattention + i * stride;
    const T *softmax_i = softmax + i * stride, *cosine_i = cosine + i * stride;
    drop_row(map, i, row);
    const T delta = T(dot<double>(row, softmax_i, D));
    for (int64_t j = 0; j < D; ++j) row[j] = softmax_i[j] * (row[j] - delta);
    const double along = dot<double>(row, cosine_i, D);
    dtemperature += along;
    for (int64_t j = 0; j < D; ++j) {
      const T dcosine = map.temperature * row[j];
      dk_norm[j] += dcosine * cosine_i[j];
      row[j] = dcosine / (map.q_norm[i] * map.k_norm[j]);
    }
    dq_norm[i] = per_norm(T(map.temperature * along), map.q_norm[i]);
  }
  for (int64_t j = 0; j < D; ++j) dk_norm[j] = per_norm(dk_norm[j], map.k_norm[j]);
  return dtemperature;
}

#define EPA_INSTANTIATE(T)                                                                         \
  template void pack(T *, int64_t, const Matrix &, int64_t, int64_t, int64_t);                     \
  template void unpack(const Matrix &, const T *, int64_t, int64_t, int64_t);                      \
  template void transpose(T *, int64_t, const T *, int64_t, int64_t, int64_t);                     \
  template void softmax_rows(T *, int64_t, int64_t, int64_t);                                      \
  template void spatial_block_fwd(const SpatialMap<T> &, const T *, int64_t, int64_t, T *,         \
                                  int64_t, T *);                                                   \
  template void spatial_block_bwd(const SpatialMap<T> &, const T *, const T *, int64_t, int64_t,   \
                                  const T *, int64_t, T *, int64_t, T *, int64_t, SpatialSums<T>,  \
                                  T *);                                                            \
  template void channel_map_fwd(const ChannelMap<T> &, T *, T *, T *);                             \
  template double channel_map_bwd(const ChannelMap<T> &, const T *, const T *, T *, T *, T *)
EPA_INSTANTIATE(float);
EPA_INSTANTIATE(double);
#undef EPA_INSTANTIATE

} // namespace epa::EPA_ISA
