// Spatial attention, forward and backward. The reference is reference.spatial_attention.
//   in   q, out (B,N,H,D)  k_proj, v_proj (B,P,H,D)  temperature (H)     kept  q_norm (B,H,D)
//   keys = k_proj * temperature / |q|, so that q goes in as it is; rows of tiles are h * D + d
//   |q| and the gradients of keys and values are sums over chunks of tokens, added in their order
#include "tile.h"

namespace epa::EPA_ISA {
namespace {

template <class T> struct Spatial {
  const SpatialAttention &a;
  int64_t C, P_padded, chunk, chunks;
  Scratch memory;
  const T *temperature;
  T *q_norm, *k_proj, *keys, *values; // (B, C), (B, C, padded P)

  explicit Spatial(const SpatialAttention &arguments)
      : a(arguments), C(a.H * a.D), P_padded(padded<T>(a.P)), chunk(chunk_tokens(a.N)),
        chunks((a.N + chunk - 1) / chunk), temperature(static_cast<const T *>(a.temperature)),
        q_norm(static_cast<T *>(a.q_norm)) {
    k_proj = memory.take<T>(a.B * C * P_padded);
    keys = memory.take<T>(a.B * C * P_padded);
    values = memory.take<T>(a.B * C * P_padded);
  }

  T norm(int64_t b, int64_t i) const {
    const T value = q_norm[b * C + i];
    return value < T(NORM_EPS) ? T(NORM_EPS) : value;
  }

  void find_norms() {
    if (!a.normalize) {
      for (int64_t i = 0; i < a.B * C; ++i) q_norm[i] = 1;
      return;
    }
    T *parts = memory.take<T>(a.B * chunks * C);
    parallel_for(a.B * chunks, double(chunk) * C, a.threads, [&](int64_t index, Scratch &scratch) {
      T *squares = parts + index * C, *q = scratch.take<T>(C * TILE_N);
      for (int64_t i = 0; i < C; ++i) squares[i] = 0;
      const int64_t b = index / chunks, start = index % chunks * chunk;
      const int64_t end = minimum(a.N, start + chunk);
      for (int64_t n = start; n < end; n += TILE_N) {
        const int64_t columns = minimum(TILE_N, end - n), width = padded<T>(columns);
        pack_heads(q, TILE_N, a.q, b, n, a.H, a.D, columns, width);
        for (int64_t i = 0; i < C; ++i) {
          Vector<T> square = {};
          for (int64_t c = 0; c < width; c += LANES<T>) {
            const Vector<T> v = load(q + i * TILE_N + c);
            square += v * v;
          }
          squares[i] += sum<T>(square);
        }
      }
    });
    for (int64_t b = 0; b < a.B; ++b)
      for (int64_t i = 0; i < C; ++i) {
        T square = 0;
        for (int64_t part = 0; part < chunks; ++part) square += parts[(b * chunks + part) * C + i];
        q_norm[b * C + i] = square_root(square);
      }
  }

  void find_keys() {
    parallel_for(a.B, double(C) * a.P, a.threads, [&](int64_t b, Scratch &) {
      T *k = k_proj + b * C * P_padded;
      pack_heads(k, P_padded, a.k_proj, b, 0, a.H, a.D, a.P, P_padded);
      pack_heads(values + b * C * P_padded, P_padded, a.v_proj, b, 0, a.H, a.D, a.P, P_padded);
      for (int64_t i = 0; i < C; ++i) {
        const T scale = T(LOG2_E * temperature[i / a.D] / norm(b, i));
        for (int64_t p = 0; p < P_padded; ++p)
          keys[(b * C + i) * P_padded + p] = k[i * P_padded + p] * scale;
      }
    });
  }

  SpatialMap<T> map(int64_t b, int64_t h) const {
    const int64_t at = (b * C + h * a.D) * P_padded;
    return {a.D, a.P, keys + at, values + at, a.threshold, a.seed};
  }

  int64_t row(int64_t b, int64_t h, int64_t n) const { return (b * a.H + h) * a.N + n; }
};

template <class T> void forward(const SpatialAttention &a, View out) {
  Spatial<T> spatial(a);
  const int64_t C = spatial.C, tiles = (a.N + TILE_N - 1) / TILE_N;
  spatial.find_norms();
  spatial.find_keys();
  parallel_for(a.B * tiles, 2. * TILE_N * C * a.P, a.threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / tiles, start = index % tiles * TILE_N;
    const int64_t columns = minimum(TILE_N, a.N - start);
    T *q = scratch.take<T>(C * TILE_N), *result = scratch.take<T>(C * TILE_N);
    pack_heads(q, TILE_N, a.q, b, start, a.H, a.D, columns, TILE_N);
    T *weights = scratch.take<T>(spatial_scratch<T>(a.P, a.D));
    for (int64_t h = 0; h < a.H; ++h)
      for (int64_t n = 0; n < columns; n += BLOCK_N<T>) {
        const int64_t at = h * a.D * TILE_N + n;
        spatial_block_fwd(spatial.map(b, h), q + at, TILE_N, spatial.row(b, h, start + n),
                          result + at, TILE_N, weights);
      }
    unpack_heads(out, b, start, a.H, a.D, result, TILE_N, columns);
  });
}

template <class T>
void backward(const SpatialAttention &a, View dout, const SpatialAttentionGradients &grads) {
  Spatial<T> spatial(a);
  const int64_t C = spatial.C, stride = spatial.P_padded, chunks = spatial.chunks;
  const int64_t chunk = spatial.chunk, N_padded = padded<T>(a.N);
  spatial.find_keys();
  // |q| passes a gradient to every token, known only after the sums over them.
  T *dq_direct = a.normalize ? spatial.memory.template take<T>(a.B * C * N_padded) : nullptr;
  const int64_t size = 2 * C * stride + a.H * stride;
  T *parts = spatial.memory.template take<T>(a.B * chunks * size);
  const double cost = 6. * chunk * C * a.P;
  parallel_for(a.B * chunks, cost, a.threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / chunks, first = index % chunks * chunk;
    const int64_t end = minimum(a.N, first + chunk);
    T *part = parts + index * size;
    std::memset(part, 0, size * sizeof(T));
    T *q = scratch.take<T>(C * TILE_N), *d = scratch.take<T>(C * TILE_N);
    T *result = scratch.take<T>(C * TILE_N), *dq = scratch.take<T>(C * TILE_N);
    T *weights = scratch.take<T>(spatial_scratch<T>(a.P, a.D));
    for (int64_t start = first; start < end; start += TILE_N) {
      const int64_t columns = minimum(TILE_N, end - start);
      pack_heads(q, TILE_N, a.q, b, start, a.H, a.D, columns, TILE_N);
      pack_heads(d, TILE_N, dout, b, start, a.H, a.D, columns, TILE_N);
      for (int64_t h = 0; h < a.H; ++h) {
        const SpatialSums<T> sums = {part + h * a.D * stride, part + (C + h * a.D) * stride,
                                     part + (2 * C + h) * stride};
        for (int64_t n = 0; n < columns; n += BLOCK_N<T>) {
          const int64_t at = h * a.D * TILE_N + n;
          spatial_block_bwd(spatial.map(b, h), q + at, q + at, TILE_N, spatial.row(b, h, start + n),
                            d + at, TILE_N, result + at, TILE_N, dq + at, TILE_N, sums, weights);
        }
      }
      if (dq_direct)
        unpack(matrix(dq_direct + b * C * N_padded + start, N_padded, 1), dq, TILE_N, C, columns);
      else
        unpack_heads(grads.q, b, start, a.H, a.D, dq, TILE_N, columns);
    }
  });

  T *dq_norm = spatial.memory.template take<T>(a.B * C);
  T *dtemperature = static_cast<T *>(grads.temperature);
  double *sums = spatial.memory.template zeros<double>(a.H);
  for (int64_t b = 0; b < a.B; ++b) {
    T *total = spatial.memory.template take<T>(size);
    add_parts(total, parts + b * chunks * size, chunks, size, a.threads);
    for (int64_t i = 0; i < C; ++i) {
      const T norm = spatial.norm(b, i), scale = spatial.temperature[i / a.D] / norm;
      const T *k = spatial.k_proj + (b * C + i) * stride;
      T *dkeys = total + i * stride;
      T along = 0;
      for (int64_t p = 0; p < a.P; ++p) along += dkeys[p] * k[p];
      sums[i / a.D] += along / norm;
      dq_norm[b * C + i] = per_norm(along * scale, norm);
      for (int64_t p = 0; p < a.P; ++p) dkeys[p] *= scale;
    }
    unpack_heads(grads.k_proj, b, 0, a.H, a.D, total, stride, a.P);
    unpack_heads(grads.v_proj, b, 0, a.H, a.D, total + C * stride, stride, a.P);
  }
  for (int64_t h = 0; h < a.H; ++h) dtemperature[h] = T(sums[h]);

  if (!a.normalize) return;
  const int64_t tiles = (a.N + TILE_N - 1) / TILE_N;
  parallel_for(a.B * tiles, 4. * TILE_N * C, a.threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / tiles, start = index % tiles * TILE_N;
    const int64_t columns = minimum(TILE_N, a.N - start);
    T *q = scratch.take<T>(C * TILE_N);
    pack_heads(q, TILE_N, a.q, b, start, a.H, a.D, columns, padded<T>(columns));
    for (int64_t i = 0; i < C; ++i)
      for (int64_t n = 0; n < columns; ++n)
        q[i * TILE_N + n] =
            q[i * TILE_N + n] * dq_norm[b * C + i] + dq_direct[(b * C + i) * N_padded + start + n];
    unpack_heads(grads.q, b, start, a.H, a.D, q, TILE_N, columns);
  });
}

} // namespace

void spatial_attention_fwd(const SpatialAttention &a, View out) {
  a.q.dtype == Dtype::float64 ? forward<double>(a, out) : forward<float>(a, out);
}

void spatial_attention_bwd(const SpatialAttention &a, View dout,
                           const SpatialAttentionGradients &grads) {
  a.q.dtype == Dtype::float64 ? backward<double>(a, dout, grads) : backward<float>(a, dout, grads);
}

} // namespace epa::EPA_ISA
