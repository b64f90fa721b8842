// The first pass over the tokens, and the last one of backward.
//   fwd  x (B,N,C), E (P,N) -> mean (B,C) float64, gram (B,C,C) centred, projected (B,J,P,C)
//   bwd  dx = partial + (x - mean) dgram + dtoken + E^T dprojected
//        dE = sum_b dprojected x^T + drows
// Each chunk of tokens is summed on its own; within it and between chunks the gram is merged by
// Chan's formula, so that nothing but deviations from a near mean is ever squared
// (docs/internals/two_pass.md).
#include "paired.h"

namespace epa::EPA_ISA {
namespace {

// Tokens of a projection that are read or written at a time. Its rows lie far apart, often by a
// power of two, so that short pieces of them push each other out of the caches.
constexpr int64_t STRIP_N = 4 * TILE_N;

// Tokens of a chunk as they come: moments about the mean of those so far.
template <class T> class Moments {
public:
  Moments(int64_t C, double *mean, T *gram, Scratch &scratch)
      : C_(C), stride_(padded<T>(C)), mean_(mean), gram_(gram), delta_(scratch.take<T>(stride_)),
        centred_(scratch.take<T>(TILE_N * stride_)) {
    for (int64_t c = 0; c < C; ++c) mean_[c] = 0;
    std::memset(gram_, 0, C * stride_ * sizeof(T));
  }

  // tokens (count, padded C), `row` apart.
  void add(const T *tokens, int64_t row, int64_t count) {
    // Differences to one token are exact where tokens are nearly constant.
    for (int64_t c = 0; c < stride_; c += LANES<T>) {
      const Vector<T> first = load(tokens + c);
      const Vector<T> total =
          sum_of<T>(count, [&](int64_t n) { return load(tokens + n * row + c) - first; });
      const Vector<T> offset = total / broadcast(T(count));
      store(delta_ + c, offset);
      for (int64_t n = 0; n < count; ++n)
        store(centred_ + n * stride_ + c, load(tokens + n * row + c) - first - offset);
    }
    const double share = double(count) / (seen_ + count);
    for (int64_t c = 0; c < C_; ++c) {
      const double delta = double(tokens[c]) + delta_[c] - mean_[c];
      mean_[c] += share * delta;
      delta_[c] = T(delta);
    }
    add_symmetric(centred_, count);
    if (seen_) {
      for (int64_t i = 0; i < C_; ++i) {
        const Vector<T> factor = broadcast(T(share * seen_) * delta_[i]);
        for (int64_t c = 0; c < stride_; c += LANES<T>) {
          T *at = gram_ + i * stride_ + c;
          store(at, load(at) + factor * load(delta_ + c));
        }
      }
    }
    seen_ += count;
  }

private:
  // gram += rows^T rows, on and above the diagonal.
  void add_symmetric(const T *rows, int64_t count) {
    constexpr int64_t WIDTH = BLOCK_N<T>;
    for (int64_t c = 0; c < C_; c += WIDTH)
      gemm<T>(minimum(C_, c + WIDTH), minimum(WIDTH, C_ - c), count, {rows, 1, stride_}, rows + c,
              stride_, gram_ + c, stride_, true);
  }

  int64_t C_, stride_, seen_ = 0;
  double *mean_;
  T *gram_, *delta_, *centred_;
};

} // namespace

template <class T> void paired_attention_summary_fwd(Layer<T> &layer) {
  const int64_t B = layer.B, N = layer.N, C = layer.C, P = layer.P, J = layer.J;
  const int64_t stride = layer.C_padded, chunk = chunk_tokens(N), chunks = (N + chunk - 1) / chunk;
  const int64_t size = (C + J * P) * stride;
  T *parts = layer.memory.template take<T>(B * chunks * size);
  double *means = layer.memory.template take<double>(B * chunks * C);
  const double cost = double(chunk) * C * (C + J * P);
  parallel_for(B * chunks, cost, layer.a.threads, [&](int64_t index, Scratch &scratch) {
    const int64_t b = index / chunks, first = index % chunks * chunk,
                  end = minimum(N, first + chunk);
    T *gram = parts + index * size, *projected = gram + C * stride;
    Moments<T> moments(C, means + index * C, gram, scratch);
    std::memset(projected, 0, J * P * stride * sizeof(T));
    T *x_packed = scratch.take<T>(TILE_N * stride), *e = scratch.take<T>(J * P * STRIP_N);
    for (int64_t n = first; n < end; n += TILE_N) {
      const int64_t count = minimum(TILE_N, end - n), strip = (n - first) % STRIP_N;
      const Matrix tokens = layer.tokens(layer.a.x, b, n);
      const bool in_place = is<T>(tokens) && tokens.column == 1 && C == stride;
      const T *x = in_place ? static_cast<const T *>(tokens.data) : x_packed;
      const int64_t x_stride = in_place ? tokens.row : stride;
      if (!in_place) pack(x_packed, stride, tokens, count, C, stride);
      moments.add(x, x_stride, count);
      for (int64_t j = 0; j < J; ++j) {
        const Matrix weight = layer.projection_tile(*layer.projection[j], n);
        T *e_j = e + j * P * STRIP_N;
        Factor<T> factor = {e_j + strip, STRIP_N, 1};
        // Where one register tile is as wide as x, each number of E is read once: no copy pays.
        if (is<T>(weight) && C <= BLOCK_N<T>) {
          factor = {static_cast<const T *>(weight.data), weight.row, weight.column};
        } else if (strip == 0) {
          const int64_t columns = minimum(STRIP_N, end - n);
          pack(e_j, STRIP_N, weight, P, columns, columns);
        }
        gemm<T>(P, C, count, factor, x, x_stride, projected + j * P * stride, stride, true);
      }
    }
  });

  // mean = sum_t n_t mean_t / N, gram = sum_t gram_t + n_t (mean_t - mean)(mean_t - mean)^T
  const auto count_of = [&](int64_t t) { return double(minimum(N, (t + 1) * chunk) - t * chunk); };
  T *deltas = layer.memory.template take<T>(B * chunks * stride);
  T *totals = layer.memory.template take<T>(B * size);
  for (int64_t b = 0; b < B; ++b) {
    const double *means_b = means + b * chunks * C;
    for (int64_t c = 0; c < C; ++c) {
      // About the first chunk's mean, which is near.
      double offset = 0;
      for (int64_t t = 1; t < chunks; ++t)
        offset += count_of(t) * (means_b[t * C + c] - means_b[c]);
      const double mean = means_b[c] + offset / N;
      layer.a.mean[b * C + c] = mean;
      for (int64_t t = 0; t < chunks; ++t)
        deltas[(b * chunks + t) * stride + c] =
            T((means_b[t * C + c] - mean) * square_root(count_of(t)));
    }
    T *total = totals + b * size;
    add_parts(total, parts + b * chunks * size, chunks, size, layer.a.threads);
    const T *delta = deltas + b * chunks * stride;
    if (chunks > 1) gemm<T>(C, C, chunks, {delta, 1, stride}, delta, stride, total, stride, true);
    T *gram = static_cast<T *>(layer.a.gram) + b * C * C;
    for (int64_t i = 0; i < C; ++i)
      for (int64_t j = 0; j < C; ++j)
        gram[i * C + j] = total[minimum(i, j) * stride + (i < j ? j : i)];
    unpack(matrix(static_cast<T *>(layer.a.projected) + b * J * P * C, C, 1), total + C * stride,
           stride, J * P, C);
  }
}

template <class T> Summary<T> kept_summary(Layer<T> &layer) {
  return {layer.a.mean, layer.rows(layer.a.gram, layer.B * layer.C),
          layer.rows(layer.a.projected, layer.B * layer.J * layer.P)};
}

template <class T>
void paired_attention_summary_bwd(Layer<T> &layer, const Mix<T> &mix,
                                  const TokenGradient<T> &gradient, T *dx_partial,
                                  const PairedAttentionGradients &grads) {
  const int64_t B = layer.B, N = layer.N, C = layer.C, P = layer.P, J = layer.J;
  const int64_t stride = layer.C_padded, chunk = chunk_tokens(N), chunks = (N + chunk - 1) / chunk;
  const double cost = double(chunk) * B * C * (C + 2 * J * P);
  parallel_for(chunks, cost, layer.a.threads, [&](int64_t index, Scratch &scratch) {
    const int64_t end = minimum(N, (index + 1) * chunk);
    T *x = scratch.take<T>(TILE_N * stride), *dx = scratch.take<T>(TILE_N * stride);
    T *x_turned = scratch.take<T>(padded<T>(C) * TILE_N);
    T *e = scratch.take<T>(J * P * STRIP_N), *de = scratch.take<T>(J * P * STRIP_N);
    for (int64_t n = index * chunk; n < end; n += TILE_N) {
      const int64_t count = minimum(TILE_N, end - n), width = padded<T>(count);
      const int64_t strip = n % chunk % STRIP_N, columns = minimum(STRIP_N, end - n);
      for (int64_t j = 0; strip == 0 && j < J; ++j) {
        pack(e + j * P * STRIP_N, STRIP_N, layer.projection_tile(*layer.projection[j], n), P,
             columns, padded<T>(columns));
        for (int64_t p = j * P; p < (j + 1) * P; ++p)
          for (int64_t c = 0; c < columns; c += LANES<T>)
            store(de + p * STRIP_N + c, broadcast(gradient.drows[p]));
      }
      for (int64_t b = 0; b < B; ++b) {
        pack(x_turned, TILE_N, turned(layer.tokens(layer.a.x, b, n)), C, count, width);
        pack(dx, stride, layer.dense_tokens(dx_partial, b, n), count, C, stride);
        transpose(x, stride, x_turned, TILE_N, C, count);
        const T *mean = mix.mean + b * stride, *dtoken = gradient.dtoken + b * stride;
        for (int64_t i = 0; i < count; ++i)
          for (int64_t c = 0; c < stride; c += LANES<T>) {
            T *at = x + i * stride + c, *to = dx + i * stride + c;
            store(at, load(at) - load(mean + c));
            store(to, load(to) + load(dtoken + c));
          }
        gemm<T>(count, C, C, {x, stride, 1}, gradient.dgram + b * C * stride, stride, dx, stride,
                true);
        for (int64_t j = 0; j < J; ++j) {
          const T *dprojected = gradient.dprojected + (b * J + j) * P * stride;
          T *e_j = e + j * P * STRIP_N + strip, *de_j = de + j * P * STRIP_N + strip;
          gemm<T>(count, C, P, {e_j, 1, STRIP_N}, dprojected, stride, dx, stride, true);
          gemm<T>(P, count, C, {dprojected, stride, 1}, x_turned, TILE_N, de_j, STRIP_N, true);
        }
        unpack(layer.tokens(grads.x, b, n), dx, stride, count, C);
      }
      const bool complete = strip + count == STRIP_N || n + count == end;
      for (int64_t j = 0; complete && j < J; ++j)
        unpack(layer.projection_tile(j ? grads.proj_v_weight : grads.proj_k_weight, n - strip),
               de + j * P * STRIP_N, STRIP_N, P, strip + count);
    }
  });
}

#define EPA_INSTANTIATE(T)                                                                         \
  template void paired_attention_summary_fwd(Layer<T> &);                                          \
  template Summary<T> kept_summary(Layer<T> &);                                                    \
  template void paired_attention_summary_bwd(Layer<T> &, const Mix<T> &, const TokenGradient<T> &, \
                                             T *, const PairedAttentionGradients &)
EPA_INSTANTIATE(float);
EPA_INSTANTIATE(double);
#undef EPA_INSTANTIATE

} // namespace epa::EPA_ISA
