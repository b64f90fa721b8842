// c (M, N) = [c +] a (M, K) b (K, N), for factors of a few hundred rows and columns.
//
// Register tiles of GEMM_ROWS x GEMM_VECTORS vectors; a is read number by number and broadcast,
// from any strides, b and c in vectors. Each element is one sum in the order of k, in whatever tile
// it lies, so the split of M and N over threads does not show in the result.
#include "tile.h"

namespace epa::EPA_ISA {
namespace {

// b is walked in slices of this many rows, which stay in the first-level cache over all of M.
constexpr int64_t SLICE_K = 256;

template <class T, int ROWS, int VECTORS, bool UNIT_ROW>
void register_tile(int64_t K, const T *a, int64_t a_row, int64_t a_column, const T *b,
                   int64_t b_stride, T *c, int64_t c_stride, bool accumulate) {
  const int64_t row = UNIT_ROW ? 1 : a_row;
  Vector<T> sums[ROWS][VECTORS] = {};
  if (accumulate) {
    const T *from = c;
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m, from += c_stride)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[m][v] = load(from + v * LANES<T>);
  }
  for (int64_t k = 0; k < K; ++k, a += a_column, b += b_stride) {
    Vector<T> b_k[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) b_k[v] = load(b + v * LANES<T>);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const Vector<T> factor = broadcast(a[m * row]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[m][v] += factor * b_k[v];
    }
  }
  // Or the compiler keeps the addresses of all rows from the loads above, in registers it lacks.
  asm("" : "+r"(c));
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m, c += c_stride)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(c + v * LANES<T>, sums[m][v]);
}

// The tile of exactly `rows` <= ROWS rows.
template <class T, int ROWS, int VECTORS, bool UNIT_ROW>
void last_rows(int64_t rows, int64_t K, const T *a, int64_t a_row, int64_t a_column, const T *b,
               int64_t b_stride, T *c, int64_t c_stride, bool accumulate) {
  if (rows == ROWS)
    return register_tile<T, ROWS, VECTORS, UNIT_ROW>(K, a, a_row, a_column, b, b_stride, c,
                                                     c_stride, accumulate);
  if constexpr (ROWS > 1)
    last_rows<T, ROWS - 1, VECTORS, UNIT_ROW>(rows, K, a, a_row, a_column, b, b_stride, c, c_stride,
                                              accumulate);
}

template <class T, int VECTORS, bool UNIT_ROW>
void columns(int64_t M, int64_t K, const Factor<T> &a, const T *b, int64_t b_stride, T *c,
             int64_t c_stride, bool accumulate) {
  for (int64_t m = 0; m < M; m += GEMM_ROWS)
    last_rows<T, GEMM_ROWS, VECTORS, UNIT_ROW>(minimum<int64_t>(GEMM_ROWS, M - m), K,
                                               a.data + m * a.row, a.row, a.column, b, b_stride,
                                               c + m * c_stride, c_stride, accumulate);
}

template <class T, bool UNIT_ROW>
void slice(int64_t M, int64_t N, int64_t K, const Factor<T> &a, const T *b, int64_t b_stride, T *c,
           int64_t c_stride, bool accumulate) {
  constexpr int64_t WIDTH = GEMM_VECTORS * LANES<T>;
  int64_t n = 0;
  for (; n + WIDTH - LANES<T> < N; n += WIDTH)
    columns<T, GEMM_VECTORS, UNIT_ROW>(M, K, a, b + n, b_stride, c + n, c_stride, accumulate);
  if (n < N) columns<T, 1, UNIT_ROW>(M, K, a, b + n, b_stride, c + n, c_stride, accumulate);
}

} // namespace

template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const Factor<T> &a, const T *b, int64_t b_stride, T *c,
          int64_t c_stride, bool accumulate) {
  for (int64_t k = 0; k < K || k == 0; k += SLICE_K) {
    const Factor<T> part = {a.data + k * a.column, a.row, a.column};
    const int64_t depth = minimum(SLICE_K, K - k);
    if (a.row == 1)
      slice<T, true>(M, N, depth, part, b + k * b_stride, b_stride, c, c_stride, accumulate || k);
    else
      slice<T, false>(M, N, depth, part, b + k * b_stride, b_stride, c, c_stride, accumulate || k);
  }
}

template void gemm(int64_t, int64_t, int64_t, const Factor<float> &, const float *, int64_t,
                   float *, int64_t, bool);
template void gemm(int64_t, int64_t, int64_t, const Factor<double> &, const double *, int64_t,
                   double *, int64_t, bool);

} // namespace epa::EPA_ISA
