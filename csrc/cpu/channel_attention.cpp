// Channel attention, forward and backward. The reference is reference.channel_attention.
//   in   q, k, v, out (B,N,H,D)  temperature (H)     kept  gram (B,H,D,D), q_norm, k_norm (B,H,D)
//   three steps: sums over tokens, the map of each head, products token by token
//   sums go over chunks of tokens, which are added in their order; rows of tiles are h * D + d
#include "tile.h"

namespace epa::EPA_ISA {
namespace {

template <class T> struct Channel {
  const ChannelAttention &a;
  int64_t C, stride, chunk, chunks, tiles;
  Scratch memory;
  T *q_norm, *k_norm, *cosine, *softmax, *attention; // (B, C) clamped, (B, C, padded D)

  explicit Channel(const ChannelAttention &arguments)
      : a(arguments), C(a.H * a.D), stride(padded<T>(a.D)), chunk(chunk_tokens(a.N)),
        chunks((a.N + chunk - 1) / chunk), tiles((a.N + TILE_N - 1) / TILE_N) {
    q_norm = memory.take<T>(a.B * C), k_norm = memory.take<T>(a.B * C);
    cosine = memory.take<T>(a.B * C * stride);
    softmax = memory.take<T>(a.B * C * stride), attention = memory.take<T>(a.B * C * stride);
  }

  ChannelMap<T> map(int64_t b, int64_t h) const {
    const int64_t at = b * C + h * a.D;
    return {a.D,
            stride,
            q_norm + at,
            k_norm + at,
            static_cast<const T *>(a.temperature)[h],
            a.threshold,
            a.seed,
            static_cast<uint64_t>(at)};
  }

  // The maps of all heads, from the kept sums.
  void find_attention() {
    const T *gram = static_cast<const T *>(a.gram);
    for (int64_t i = 0; i < a.B * C; ++i) {
      q_norm[i] = clamped(static_cast<const T *>(a.q_norm)[i]);
      k_norm[i] = clamped(static_cast<const T *>(a.k_norm)[i]);
    }
    parallel_for(a.B * a.H, 8. * a.D * a.D, a.threads, [&](int64_t index, Scratch &) {
      const int64_t at = index * a.D * stride;
      pack(cosine + at, stride, matrix(gram + index * a.D * a.D, a.D, 1), a.D, a.D, stride);
      channel_map_fwd(map(index / a.H, index % a.H), cosine + at, softmax + at, attention + at);
    });
  }

  // parts (B * chunks, C, stride + extra): left_h (D, tokens) right_h (tokens, D) of each head
  // and chunk; f(left, right, columns, width, part) sees each tile of rows h * D + d.
  template <class F> T *products(const View &left, const View &right, int64_t size, const F &f) {
    T *parts = memory.take<T>(a.B * chunks * size);
    const double cost = double(chunk) * C * stride;
    parallel_for(a.B * chunks, cost, a.threads, [&](int64_t index, Scratch &scratch) {
      const int64_t b = index / chunks, first = index % chunks * chunk;
      const int64_t end = minimum(a.N, first + chunk), C_padded = padded<T>(C);
      T *part = parts + index * size;
      std::memset(part, 0, size * sizeof(T));
      T *l = scratch.take<T>(C_padded * TILE_N), *r = scratch.take<T>(C_padded * TILE_N);
      T *turned = scratch.take<T>(TILE_N * C_padded);
      for (int64_t start = first; start < end; start += TILE_N) {
        const int64_t columns = minimum(TILE_N, end - start), width = padded<T>(columns);
        pack_heads(l, TILE_N, left, b, start, a.H, a.D, columns, width);
        pack_heads(r, TILE_N, right, b, start, a.H, a.D, columns, width);
        transpose(turned, C_padded, r, TILE_N, C, columns);
        for (int64_t h = 0; h < a.H; ++h)
          gemm<T>(a.D, a.D, columns, {l + h * a.D * TILE_N, TILE_N, 1}, turned + h * a.D, C_padded,
                  part + h * a.D * stride, stride, true);
        f(l, r, width, part);
      }
    });
    T *totals = memory.take<T>(a.B * size);
    for (int64_t b = 0; b < a.B; ++b)
      add_parts(totals + b * size, parts + b * chunks * size, chunks, size, a.threads);
    return totals;
  }

  static T clamped(T norm) { return norm < T(NORM_EPS) ? T(NORM_EPS) : norm; }
};

// squares[i] += sum over the row; rows are padded with zeros.
template <class T> void add_squares(T *squares, const T *rows, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    Vector<T> square = {};
    for (int64_t c = 0; c < width; c += LANES<T>) {
      const Vector<T> v = load(rows + i * TILE_N + c);
      square += v * v;
    }
    squares[i] += sum<T>(square);
  }
}

template <class T> void forward(const ChannelAttention &a, View out) {
  Channel<T> channel(a);
  const int64_t C = channel.C, stride = channel.stride, C_padded = padded<T>(C);
  const int64_t size = C * stride + 2 * C_padded;
  const T *totals =
      channel.products(a.q, a.k, size, [&](const T *q, const T *k, int64_t width, T *part) {
        add_squares(part + C * stride, q, C, width);
        add_squares(part + C * stride + C_padded, k, C, width);
      });
  for (int64_t b = 0; b < a.B; ++b) {
    const T *total = totals + b * size;
    unpack(matrix(static_cast<T *>(a.gram) + b * C * a.D, a.D, 1), total, stride, C, a.D);
    for (int64_t i = 0; i < C; ++i) {
      static_cast<T *>(a.q_norm)[b * C + i] = square_root(total[C * stride + i]);
      static_cast<T *>(a.k_norm)[b * C + i] = square_root(total[C * stride + C_padded + i]);
    }
  }
  channel.find_attention();

  parallel_for(a.B * channel.tiles, double(TILE_N) * C * a.D, a.threads,
               [&](int64_t index, Scratch &scratch) {
                 const int64_t b = index / channel.tiles, start = index % channel.tiles * TILE_N;
                 const int64_t columns = minimum(TILE_N, a.N - start);
                 T *v = scratch.take<T>(C * TILE_N), *result = scratch.take<T>(C * TILE_N);
                 pack_heads(v, TILE_N, a.v, b, start, a.H, a.D, columns, padded<T>(columns));
                 for (int64_t h = 0; h < a.H; ++h)
                   gemm<T>(a.D, columns, a.D,
                           {channel.attention + (b * C + h * a.D) * stride, stride, 1},
                           v + h * a.D * TILE_N, TILE_N, result + h * a.D * TILE_N, TILE_N);
                 unpack_heads(out, b, start, a.H, a.D, result, TILE_N, columns);
               });
}

template <class T>
void backward(const ChannelAttention &a, View dout, const ChannelAttentionGradients &grads) {
  Channel<T> channel(a);
  const int64_t C = channel.C, stride = channel.stride, D = a.D;
  channel.find_attention();
  T *ddots = channel.products(dout, a.v, C * stride, [](const T *, const T *, int64_t, T *) {});
  T *dq_norm = channel.memory.template take<T>(a.B * C);
  T *dk_norm = channel.memory.template take<T>(a.B * C);
  double *dtemperature = channel.memory.template take<double>(a.B * a.H);
  parallel_for(a.B * a.H, 8. * D * D, a.threads, [&](int64_t index, Scratch &) {
    const int64_t row = index * D;
    dtemperature[index] = channel_map_bwd(
        channel.map(index / a.H, index % a.H), channel.cosine + row * stride,
        channel.softmax + row * stride, ddots + row * stride, dq_norm + row, dk_norm + row);
  });
  for (int64_t h = 0; h < a.H; ++h) {
    double total = 0;
    for (int64_t b = 0; b < a.B; ++b) total += dtemperature[b * a.H + h];
    static_cast<T *>(grads.temperature)[h] = T(total);
  }

  parallel_for(a.B * channel.tiles, 3. * TILE_N * C * D, a.threads,
               [&](int64_t index, Scratch &scratch) {
                 const int64_t b = index / channel.tiles, start = index % channel.tiles * TILE_N;
                 const int64_t columns = minimum(TILE_N, a.N - start), width = padded<T>(columns);
                 T *q = scratch.take<T>(C * TILE_N), *k = scratch.take<T>(C * TILE_N);
                 T *d = scratch.take<T>(C * TILE_N), *result = scratch.take<T>(C * TILE_N);
                 pack_heads(q, TILE_N, a.q, b, start, a.H, D, columns, width);
                 pack_heads(k, TILE_N, a.k, b, start, a.H, D, columns, width);
                 pack_heads(d, TILE_N, dout, b, start, a.H, D, columns, width);
                 // result_h = map_h (or its transpose) right_h + norm * own_h
                 const auto product = [&](const T *map, bool transposed, const T *right,
                                          const T *norm, const T *own, const View &to) {
                   for (int64_t i = 0; i < C; ++i)
                     for (int64_t n = 0; n < width; ++n)
                       result[i * TILE_N + n] = norm ? norm[b * C + i] * own[i * TILE_N + n] : T(0);
                   for (int64_t h = 0; h < a.H; ++h) {
                     const T *head = map + (b * C + h * D) * stride;
                     gemm<T>(D, columns, D,
                             transposed ? Factor<T>{head, 1, stride} : Factor<T>{head, stride, 1},
                             right + h * D * TILE_N, TILE_N, result + h * D * TILE_N, TILE_N, true);
                   }
                   unpack_heads(to, b, start, a.H, D, result, TILE_N, columns);
                 };
                 product(ddots, false, k, dq_norm, q, grads.q);
                 product(ddots, true, q, dk_norm, k, grads.k);
                 product(channel.attention, true, d, nullptr, nullptr, grads.v);
               });
}

} // namespace

void channel_attention_fwd(const ChannelAttention &a, View out) {
  a.q.dtype == Dtype::float64 ? forward<double>(a, out) : forward<float>(a, out);
}

void channel_attention_bwd(const ChannelAttention &a, View dout,
                           const ChannelAttentionGradients &grads) {
  a.q.dtype == Dtype::float64 ? backward<double>(a, dout, grads) : backward<float>(a, dout, grads);
}

} // namespace epa::EPA_ISA
