// The second pass over the tokens: queries, spatial softmax and y, straight from x.
//   fwd  q = Wq x + b, out_s = softmax(q keys) values, y = [out_s' Wo1^T + b1, x matrix + constant]
//   bwd  the same again, and from dy: the gradient of q and of the channel branch at x, and all
//        sums over tokens, chunk by chunk, added in the order of the chunks
// Tokens lie in the lanes, so maxima and sums over p need no exchange between lanes.
//
// out_s' has the tokens in another order than x under layout "official": row r of it is C
// consecutive numbers of the flat (d, h, n) order. Where C, vectors and tiles divide N a tile of
// tokens is a set of whole rows, and the output projection happens in the tile; else out_s goes
// through memory.
#include "paired.h"

namespace epa::EPA_ISA {
namespace {

enum class Route { rows, tokens, memory };

// How out_s becomes out_s' Wo1^T.
template <class T> struct Plan {
  Route route;
  int64_t tile; // tokens

  explicit Plan(const Layer<T> &layer) : route(Route::memory), tile(TILE_N) {
    const int64_t N = layer.N, C = layer.C;
    if (!layer.concatenates()) return;
    if (layer.a.layout == Layout::tokens) {
      route = Route::tokens;
      return;
    }
    constexpr int64_t LARGEST = 4 * TILE_N;
    int64_t rows = C > TILE_N ? C : TILE_N / C * C;
    while (rows % BLOCK_N<T> && rows <= LARGEST) rows += C;
    if (C % LANES<T> || N % C || N % BLOCK_N<T> || rows > LARGEST) return;
    route = Route::rows, tile = rows;
  }
};

// The place of out_s in memory, (B, N * C) in its layout: rows h * D + d, columns n.
template <class T>
Matrix spatial_matrix(const Layer<T> &layer, T *data, int64_t b, int64_t h, int64_t n) {
  T *sample = data + b * layer.N * layer.C;
  if (layer.a.layout == Layout::tokens)
    return matrix(sample + n * layer.C + h * layer.D, 1, layer.C);
  return matrix(sample + layer.flat(h, 0) * layer.N + n, layer.H * layer.N, 1);
}

// Rows of a tile's part of out_s, in the order in which a row of it is a row of out_s'.
template <class T> struct TileRows {
  const Layer<T> &layer;
  Route route;
  int64_t stride;

  T *head(T *tile, int64_t h) const {
    return tile + (route == Route::rows ? h : h * layer.D) * stride;
  }
  int64_t row_stride() const { return route == Route::rows ? layer.H * stride : stride; }
};

// Rows of a (B, N, C) tensor, columns from `column` on, that belong to a tile of out_s'.
template <class T, class F>
void for_tile_rows(const Layer<T> &layer, const View &view, int64_t b, int64_t n, int64_t count,
                   const F &f) {
  const int64_t rows = count / layer.C;
  for (int64_t i = 0; i < layer.C; ++i) {
    const int64_t row = (i * layer.N + n) / layer.C;
    f(matrix(view, 1, 2, b * view.stride[0] + row * view.stride[1]), i * rows, rows);
  }
}

template <class T> void fill_rows(T *to, int64_t stride, int64_t rows, const T *row) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < stride; c += LANES<T>) store(to + r * stride + c, load(row + c));
}

// total (width) += sum of the rows (count, width), width padded to vectors.
template <class T> void add_rows(T *total, const T *rows, int64_t width, int64_t count) {
  for (int64_t c = 0; c < width; c += LANES<T>)
    store(total + c, load(total + c) +
                         sum_of<T>(count, [&](int64_t r) { return load(rows + r * width + c); }));
}

// (O) or null as a padded row.
template <class T> T *bias_row(Scratch &memory, const T *bias, int64_t O) {
  T *row = memory.zeros<T>(padded<T>(O));
  if (bias) std::memcpy(row, bias, O * sizeof(T));
  return row;
}

} // namespace

template <class T>
void paired_attention_output_fwd(Layer<T> &layer, const Mix<T> &mix, const View &y) {
  const int64_t B = layer.B, N = layer.N, C = layer.C, H = layer.H, P = layer.P, D = layer.D;
  const int64_t O = layer.O, O_padded = layer.O_padded, stride = layer.C_padded;
  const Plan<T> plan(layer);
  const int64_t tile = plan.tile, tiles = (N + tile - 1) / tile;
  const T *bias = bias_row(layer.memory, layer.out_proj_bias, O);
  T *weight = nullptr, *out_s = nullptr;
  if (layer.concatenates()) {
    weight = layer.memory.template take<T>(C * O_padded); // Wo1^T
    pack(weight, O_padded, matrix(layer.out_proj, 1, stride), C, O, O_padded);
  }
  if (plan.route == Route::memory) out_s = layer.memory.template take<T>(B * N * C);
  const int64_t y_column = layer.concatenates() ? O : 0;

  const double cost = double(tile) * C * (2 * C + 2 * P);
  parallel_for(B * tiles, cost, layer.a.threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / tiles, n = index % tiles * tile, count = minimum(tile, N - n);
    const int64_t width = round_up<int64_t>(count, BLOCK_N<T>);
    T *x = scratch.take<T>(C * width), *q = scratch.take<T>(C * width),
      *out = scratch.take<T>(C * width);
    const TileRows<T> rows = {layer, plan.route, width};
    pack(x, width, turned(layer.tokens(layer.a.x, b, n)), C, count, width);
    for (int64_t i = 0; layer.bias && i < C; ++i)
      for (int64_t c = 0; c < width; c += LANES<T>)
        store(q + i * width + c, broadcast(layer.bias[i]));
    gemm<T>(C, width, C, {layer.part(0), stride, 1}, x, width, q, width, layer.bias);

    T *weights = scratch.take<T>(spatial_scratch<T>(P, D));
    for (int64_t h = 0; h < H; ++h) {
      const int64_t at = (b * C + h * D) * layer.P_padded;
      const SpatialMap<T> map = {
          D, P, mix.keys + at, mix.values + at, layer.a.spatial_threshold, layer.a.seed};
      for (int64_t c = 0; c < count; c += BLOCK_N<T>)
        spatial_block_fwd(map, q + h * D * width + c, width, layer.map_row(b, h, n + c),
                          rows.head(out, h) + c, rows.row_stride(), weights);
      if (out_s) unpack(spatial_matrix(layer, out_s, b, h, n), rows.head(out, h), width, D, count);
    }

    T *result = scratch.take<T>(count * O_padded);
    if (!out_s) {
      fill_rows(result, O_padded, count, bias);
      const Factor<T> factor =
          plan.route == Route::rows ? Factor<T>{out, C, 1} : Factor<T>{out, 1, width};
      gemm<T>(count, O, C, factor, weight, O_padded, result, O_padded, true);
      if (plan.route == Route::tokens)
        unpack(layer.tokens(y, b, n), result, O_padded, count, O);
      else
        for_tile_rows(layer, y, b, n, count, [&](const Matrix &to, int64_t first, int64_t some) {
          unpack(to, result + first * O_padded, O_padded, some, O);
        });
    }
    if (layer.concatenates()) {
      fill_rows(result, O_padded, count, mix.constant + b * O_padded);
      gemm<T>(count, O, C, {x, 1, width}, mix.matrix + b * C * O_padded, O_padded, result, O_padded,
              true);
      unpack(layer.tokens(y, b, n, y_column), result, O_padded, count, O);
    }
  });
  if (!out_s) return;

  // out_s is complete: y_s, and for kind sum the channel branch on top.
  const int64_t last_tiles = (N + TILE_N - 1) / TILE_N;
  parallel_for(B * last_tiles, double(TILE_N) * C * O, layer.a.threads,
               [&](int64_t index, Scratch &scratch) {
                 const int64_t b = index / last_tiles, n = index % last_tiles * TILE_N;
                 const int64_t count = minimum(TILE_N, N - n);
                 const T *from = out_s + (b * N + n) * C;
                 T *result = scratch.take<T>(count * O_padded);
                 if (layer.concatenates()) {
                   fill_rows(result, O_padded, count, bias);
                   gemm<T>(count, O, C, {from, C, 1}, weight, O_padded, result, O_padded, true);
                 } else {
                   T *x = scratch.take<T>(count * stride);
                   pack(x, stride, layer.tokens(layer.a.x, b, n), count, C, stride);
                   fill_rows(result, O_padded, count, mix.constant + b * O_padded);
                   gemm<T>(count, O, C, {x, stride, 1}, mix.matrix + b * C * O_padded, O_padded,
                           result, O_padded, true);
                   for (int64_t r = 0; r < count; ++r)
                     for (int64_t c = 0; c < C; ++c) result[r * O_padded + c] += from[r * C + c];
                 }
                 unpack(layer.tokens(y, b, n), result, O_padded, count, O);
               });
}

template <class T>
T *paired_attention_output_bwd(Layer<T> &layer, const Mix<T> &mix, const View &dy, T *dx_partial) {
  const int64_t B = layer.B, N = layer.N, C = layer.C, H = layer.H, P = layer.P, D = layer.D;
  const int64_t O = layer.O, O_padded = layer.O_padded, stride = layer.C_padded;
  const int threads = layer.a.threads;
  const Plan<T> plan(layer);
  const bool projects = layer.concatenates(), in_memory = plan.route == Route::memory;
  const int64_t tile = plan.tile, chunk = round_up(chunk_tokens(N), tile);
  const int64_t chunks = (N + chunk - 1) / chunk;
  const Sums<T> at(layer);
  T *parts = layer.memory.template take<T>(B * chunks * at.size);
  const int64_t dy_column = projects ? O : 0;

  // The gradient of out_s' as a whole, where tiles cannot make it.
  T *out_s = nullptr, *dout_s = nullptr;
  if (in_memory && projects) {
    out_s = layer.memory.template take<T>(B * N * C);
    dout_s = layer.memory.template take<T>(B * N * C);
    const int64_t tiles = (N + TILE_N - 1) / TILE_N;
    parallel_for(B * tiles, double(TILE_N) * C * O, threads, [&](int64_t index, Scratch &scratch) {
      const int64_t b = index / tiles, n = index % tiles * TILE_N, count = minimum(TILE_N, N - n);
      T *d = scratch.take<T>(count * O_padded), *to = scratch.take<T>(count * stride);
      pack(d, O_padded, layer.tokens(dy, b, n), count, O, O_padded);
      gemm<T>(count, C, O, {d, O_padded, 1}, layer.out_proj, stride, to, stride);
      unpack(layer.dense_tokens(dout_s, b, n), to, stride, count, C);
    });
  }

  const double cost = double(chunk) * C * (5 * C + 6 * P);
  parallel_for(B * chunks, cost, threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / chunks, start = index % chunks * chunk,
                  end = minimum(N, start + chunk);
    T *part = parts + index * at.size;
    std::memset(part, 0, at.size * sizeof(T));
    const T *mean = mix.mean + b * stride;
    const int64_t most = round_up<int64_t>(minimum(tile, end - start), BLOCK_N<T>);
    const int64_t C_rows = padded<T>(C);
    T *x = scratch.take<T>(C_rows * most), *x_turned = scratch.take<T>(most * stride);
    T *q = scratch.take<T>(C * most), *q_centred = scratch.take<T>(C * most);
    T *out = scratch.take<T>(C_rows * most), *dout = scratch.take<T>(C_rows * most);
    T *dq = scratch.take<T>(C * most), *d = scratch.take<T>(most * O_padded);
    T *dx = scratch.take<T>(most * stride), *out_turned = scratch.take<T>(most * stride);
    T *d_turned = scratch.take<T>(O * most);
    T *weights = scratch.take<T>(spatial_scratch<T>(P, D));
    for (int64_t n = start; n < end; n += tile) {
      const int64_t count = minimum(tile, end - n), width = round_up<int64_t>(count, BLOCK_N<T>);
      const TileRows<T> rows = {layer, plan.route, width};
      pack(x, width, turned(layer.tokens(layer.a.x, b, n)), C, count, width);
      for (int64_t i = 0; i < C; ++i)
        for (int64_t c = 0; c < count; ++c) x[i * width + c] -= mean[i];
      transpose(x_turned, stride, x, width, C, count);
      gemm<T>(C, width, C, {layer.part(0), stride, 1}, x, width, q_centred, width);
      for (int64_t i = 0; i < C; ++i)
        for (int64_t c = 0; c < width; c += LANES<T>)
          store(q + i * width + c,
                load(q_centred + i * width + c) + broadcast(mix.q_mean[b * C + i]));

      // dout = dy_s Wo1, zero in lanes without a token.
      if (plan.route == Route::rows) {
        for_tile_rows(layer, dy, b, n, count, [&](const Matrix &from, int64_t first, int64_t some) {
          pack(d + first * O_padded, O_padded, from, some, O, O_padded);
        });
        add_rows(part + at.dout_proj_bias, d, O_padded, count);
        gemm<T>(count, C, O, {d, O_padded, 1}, layer.out_proj, stride, dout, C);
      } else if (plan.route == Route::tokens) {
        pack(d, O_padded, layer.tokens(dy, b, n), count, O, O_padded);
        add_rows(part + at.dout_proj_bias, d, O_padded, count);
        pack(d_turned, width, turned(layer.tokens(dy, b, n)), O, count, width);
        gemm<T>(C, width, O, {layer.out_proj, 1, stride}, d_turned, width, dout, width);
      } else {
        for (int64_t h = 0; h < H; ++h) {
          Matrix from = spatial_matrix(layer, dout_s, b, h, n);
          if (!projects) // dy itself, dense, in its own dtype
            from = layer.a.layout == Layout::tokens
                       ? turned(layer.tokens(dy, b, n, h * D))
                       : matrix(View{dy.data, dy.dtype, {H * N, 1, 0, 0}}, 0, 1,
                                b * dy.stride[0] + layer.flat(h, 0) * N + n);
          pack(rows.head(dout, h), width, from, D, count, width);
        }
      }

      for (int64_t h = 0; h < H; ++h) {
        const int64_t i = h * D, key = (b * C + i) * layer.P_padded;
        const SpatialMap<T> map = {
            D, P, mix.keys + key, mix.values + key, layer.a.spatial_threshold, layer.a.seed};
        const SpatialSums<T> sums = {part + at.dkeys + i * layer.P_padded,
                                     part + at.dvalues + i * layer.P_padded,
                                     part + at.dlogits + h * layer.P_padded};
        for (int64_t c = 0; c < count; c += BLOCK_N<T>)
          spatial_block_bwd(map, q + i * width + c, q_centred + i * width + c, width,
                            layer.map_row(b, h, n + c), rows.head(dout, h) + c, rows.row_stride(),
                            rows.head(out, h) + c, rows.row_stride(), dq + i * width + c, width,
                            sums, weights);
        if (out_s)
          unpack(spatial_matrix(layer, out_s, b, h, n), rows.head(out, h), width, D, count);
      }

      if (projects && !in_memory) {
        const T *right = out;
        if (plan.route == Route::tokens) {
          transpose(out_turned, stride, out, width, C, count);
          right = out_turned;
        }
        gemm<T>(O, C, count, {d, 1, O_padded}, right, stride, part + at.dout_proj, stride, true);
      }

      // The channel branch, and what comes back through q.
      pack(d, O_padded, layer.tokens(dy, b, n, dy_column), count, O, O_padded);
      add_rows(part + at.dconstant, d, O_padded, count);
      gemm<T>(O, C, count, {d, 1, O_padded}, x_turned, stride, part + at.dmatrix, stride, true);
      gemm<T>(C, C, count, {dq, width, 1}, x_turned, stride, part + at.dq_weight, stride, true);
      gemm<T>(count, C, O, {d, O_padded, 1}, mix.matrix + b * O * stride, stride, dx, stride);
      gemm<T>(count, C, C, {dq, 1, width}, layer.part(0), stride, dx, stride, true);
      unpack(layer.dense_tokens(dx_partial, b, n), dx, stride, count, C);
    }
  });

  if (out_s) {
    parallel_for(B * chunks, double(chunk) * C * O, threads, [&](int64_t index, Scratch &scratch) {
      const int64_t b = index / chunks, start = index % chunks * chunk,
                    end = minimum(N, start + chunk);
      T *d = scratch.take<T>(TILE_N * O_padded), *rows = scratch.take<T>(TILE_N * stride);
      for (int64_t n = start; n < end; n += TILE_N) {
        const int64_t count = minimum(TILE_N, end - n);
        pack(d, O_padded, layer.tokens(dy, b, n), count, O, O_padded);
        pack(rows, stride, layer.dense_tokens(out_s, b, n), count, C, stride);
        T *part = parts + index * at.size;
        add_rows(part + at.dout_proj_bias, d, O_padded, count);
        gemm<T>(O, C, count, {d, 1, O_padded}, rows, stride, part + at.dout_proj, stride, true);
      }
    });
  }
  T *sums = layer.memory.template take<T>(B * at.size);
  for (int64_t b = 0; b < B; ++b)
    add_parts(sums + b * at.size, parts + b * chunks * at.size, chunks, at.size, threads);
  return sums;
}

#define EPA_INSTANTIATE(T)                                                                         \
  template void paired_attention_output_fwd(Layer<T> &, const Mix<T> &, const View &);             \
  template T *paired_attention_output_bwd(Layer<T> &, const Mix<T> &, const View &, T *)
EPA_INSTANTIATE(float);
EPA_INSTANTIATE(double);
#undef EPA_INSTANTIATE

} // namespace epa::EPA_ISA
