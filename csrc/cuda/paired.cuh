// Paired attention: what its kernels share. The reference is reference.paired_attention, the form
// and the names below are those of two_pass.py.
//
//   paired_summary  over tokens: mean, gram, projected; and last in backward: dx, dprojections
//   paired_mix      between the passes, nothing of size N; backward ends with paired_gather
//   paired_output   over tokens: q, spatial softmax, y; and in backward all sums over tokens
//   paired_product  the output projection, where it is not a part of the output pass; and back
//
// Sums over tokens are left by chunk and added up in the order of chunks by the launch that reads
// them. Channels go head by head, i = h D + d; all small matrices are dense.
#pragma once
#include "heads.cuh"

namespace epa::cuda {

constexpr int PAIRED_THREADS = 256, PAIRED_WARPS = PAIRED_THREADS / 32;
// Rows of small matrices that a block makes: of k_proj and v_proj, of what has O or C rows.
constexpr int PROJECTED_ROWS = 8, MATRIX_ROWS = 16;
constexpr int TOKEN_ROWS = 32; // tokens at a time, at most

template <class T> struct Tokens {
  T *data;
  int64_t stride_b, stride_n, stride_c;
  __device__ __forceinline__ T &at(int64_t b, int64_t n, int64_t c) const {
    return data[b * stride_b + n * stride_n + c * stride_c];
  }
};

// A parameter or its gradient. All of a call are of T, or all of what sums are taken in: known when
// it runs, since kernels for each pair of dtypes would take twice as long to compile.
template <class T> struct Parameter {
  using A = Accumulate<T>;
  void *data; // null where absent
  bool is_wide;

  __host__ __device__ explicit operator bool() const { return data; }
  __device__ __forceinline__ A operator[](int64_t i) const {
    if constexpr (!std::is_same_v<T, A>)
      if (!is_wide) return widen(static_cast<const T *>(data)[i]);
    return static_cast<const A *>(data)[i];
  }
  __device__ __forceinline__ void store(int64_t i, A value) const {
    if constexpr (!std::is_same_v<T, A>)
      if (!is_wide) {
        static_cast<T *>(data)[i] = narrow<T>(value);
        return;
      }
    static_cast<A *>(data)[i] = value;
  }
};

template <class T> struct Projection {
  Parameter<T> weight;
  int64_t stride_p, stride_n;
  __device__ __forceinline__ int64_t offset(int64_t p, int64_t n) const {
    return p * stride_p + n * stride_n;
  }
  __device__ __forceinline__ Accumulate<T> at(int64_t p, int64_t n) const {
    return weight[offset(p, n)];
  }
};

// One call.
template <class T> struct Paired {
  using A = Accumulate<T>;
  int64_t N;
  int B, C, H, D, P, J, O; // J projections; O columns of each branch's output
  bool is_sum, is_official, is_direct;
  uint32_t channel_threshold, spatial_threshold;
  const int64_t *seed;
  Tokens<const T> x;
  Projection<T> projection[2]; // of keys and values
  Parameter<T> projection_bias[2];
  Parameter<T> qkvv_weight, qkvv_bias, temperature, temperature2;
  Parameter<T> out_proj_weight, out_proj_bias, out_proj2_weight, out_proj2_bias;

  // Summary, kept for backward unless direct; and what each chunk of it left.
  int chunks;
  int64_t chunk;                             // tokens
  double *mean;                              // (B, C)
  A *gram, *projected;                       // (B, C, C), (B, J, P, C)
  double *chunk_means;                       // (B, chunks, C)
  A *chunk_grams, *chunk_projected, *deltas; // (B, chunks, ...); (B, H, chunks, C)
  A *row_sums;                               // (J, P), null without qkvv_bias
  A *centred;                                // (B, H, N, 2 D): q and k without their means; direct

  // Mix.
  A *q_gram, *k_gram;               // (B, C, C): Wq M, Wk M
  A *q_mean, *k_mean;               // (B, C)
  A *q_norm, *k_norm;               // (B, C), clamped
  A *dots, *attention;              // (B, H, D, D): <q_i, k_j>, the map after dropout
  A *value_matrix, *value_constant; // (B, C, C), (B, C): A Wvc, A bvc
  A *matrix_parts, *constant_parts; // (B, H, O, C), (B, H, O): Wo2 A Wvc and Wo2 A bvc by head
  A *k_proj, *v_proj, *scale;       // (B, H, P, D), (B, C): temperature2 / |q|

  // Of q, k, vc or vs: row i of its weight, element i of its bias.
  __device__ __forceinline__ A weight(int part, int64_t i, int c) const {
    return qkvv_weight[(int64_t(part) * C + i) * C + c];
  }
  __device__ __forceinline__ A bias(int part, int64_t i) const {
    return qkvv_bias ? qkvv_bias[int64_t(part) * C + i] : A(0);
  }
  // Where an element of out_s lies in the flat out_s' of a sample.
  __device__ __forceinline__ int64_t flat(int64_t n, int h, int d) const {
    return is_official ? (int64_t(d) * H + h) * N + n : n * C + h * D + d;
  }
  __device__ __forceinline__ int64_t tokens_of(int64_t index) const {
    return N - index * chunk < chunk ? N - index * chunk : chunk;
  }
  // The channel branch's matrix and constant, heads added up; not of kind sum.
  __device__ __forceinline__ A matrix(int64_t b, int o, int c) const {
    A sum = 0;
#pragma unroll 4
    for (int h = 0; h < H; ++h) sum += matrix_parts[((b * H + h) * O + o) * C + c];
    return sum;
  }
  __device__ __forceinline__ A constant(int64_t b, int o) const {
    A sum = out_proj2_bias ? out_proj2_bias[o] : A(0);
    for (int h = 0; h < H; ++h) sum += constant_parts[(b * H + h) * O + o];
    return sum;
  }
  // x without its mean, as the output pass and the last one take it.
  __device__ __forceinline__ A centred_x(int64_t b, int64_t n, int c) const {
    return widen(x.at(b, n, c)) - A(mean[b * C + c]);
  }
};

// What backward has beside it. dout and out_s are flat, as out_s' is.
template <class T> struct PairedBackward {
  using A = Accumulate<T>;
  const T *dy;          // (B, N, C)
  T *dout, *out_s, *dq; // (B, N, C); dout is dy itself and out_s null for kind sum

  // Sums over each chunk of tokens, and what they come to.
  int chunks;
  int64_t chunk;
  bool is_specialised;        // sums over tokens are taken on tensor cores
  A *head_sums, *head_totals; // (B, H, [chunks,] head_size)
  A *matrix_sums, *dmatrix, *constant_sums, *dconstant; // (B, [chunks,] O, C), (B, [chunks,] O)
  A *q_weight_sums;                                     // (B, chunks, C, C)
  A *out_proj_sums, *out_proj_bias_sums;                // (B, chunks, O, C), (B, chunks, O)

  // By head, of one sample each.
  A *dvalue_matrix, *dvalue_constant; // (B, C, C), (B, C)
  A *ddots;                           // (B, H, D, D)
  A *dq_norm, *dk_norm;               // (B, C): d|q| / |q|
  A *dmeans;                          // (B, 2 C): of the means of q and k
  A *dtotals;                         // (B, 2 C): N times those, and all else that multiplies mean
  A *factors;                         // (B, 2 C, C): dgram = factors^T [Wq; Wk]
  A *dk_proj, *dv_proj;               // (B, P, C)
  A *dprojection_bias, *drow_sums;    // (B, H, 2, P): of keys and of values
  A *dqkvv_bias, *dtemperature, *dtemperature2; // (B, 4 C), (B, H)

  // For the last pass: token x gets (x - mean) dgram + dtoken + E^T dprojected + dy_c matrix.
  A *dgram, *dtoken, *dprojected, *drows, *matrix; // (B, C, C), (B, C), (B, J, P, C), (J, P),
                                                   // (B, O, C)
  Tokens<T> dx;
  Projection<T> dprojection[2];
  Parameter<T> qkvv_weight, qkvv_bias, proj_k_bias, proj_v_bias, temperature, temperature2;
  Parameter<T> out_proj_weight, out_proj_bias, out_proj2_weight, out_proj2_bias;
};

// Of a head's sums: dkeys and dv_proj (P, D), then dlogits (P).
__host__ __device__ __forceinline__ int64_t head_size(int P, int D) {
  return int64_t(2 * P) * D + P;
}

// sum over chunks of element i of sums (chunks, size)
template <class A>
__device__ __forceinline__ A sum_chunks_of(const A *sums, int chunks, int64_t size, int64_t i) {
  A sum = 0;
#pragma unroll 8
  for (int t = 0; t < chunks; ++t) sum += sums[t * size + i];
  return sum;
}

// Matrix products by a block: `next` gives each thread SIDE x SIDE elements until all are made.
template <class A> class Products {
public:
  __device__ __forceinline__ Products(int rows, int columns)
      : rows_(rows), columns_(columns), row_groups_((rows + SIDE - 1) / SIDE),
        column_groups_((columns + SIDE - 1) / SIDE), group_(int(threadIdx.x) - int(blockDim.x)) {}

  __device__ __forceinline__ bool next() {
    group_ += blockDim.x;
#pragma unroll
    for (int i = 0; i < SIDE; ++i)
#pragma unroll
      for (int j = 0; j < SIDE; ++j) sum_[i][j] = 0;
    return group_ < row_groups_ * column_groups_;
  }

  // element (i, j) += sum_k left(i, k) right(k, j)
  template <class Left, class Right>
  __device__ __forceinline__ void add(int depth, Left left, Right right) {
#pragma unroll 1
    for (int k = 0; k < depth; ++k) {
      A factor[SIDE];
#pragma unroll
      for (int j = 0; j < SIDE; ++j) factor[j] = right(k, clamped(column(j), columns_));
#pragma unroll
      for (int i = 0; i < SIDE; ++i) {
        const A other = left(clamped(row(i), rows_), k);
#pragma unroll
        for (int j = 0; j < SIDE; ++j) sum_[i][j] += other * factor[j];
      }
    }
  }

  template <class Use> __device__ __forceinline__ void each(Use use) const {
#pragma unroll
    for (int i = 0; i < SIDE; ++i)
#pragma unroll
      for (int j = 0; j < SIDE; ++j)
        if (row(i) < rows_ && column(j) < columns_) use(row(i), column(j), sum_[i][j]);
  }

private:
  static constexpr int SIDE = 4;
  // Neighbouring threads have neighbouring columns.
  __device__ __forceinline__ int row(int i) const {
    return group_ / column_groups_ + i * row_groups_;
  }
  __device__ __forceinline__ int column(int j) const {
    return group_ % column_groups_ + j * column_groups_;
  }
  static __device__ __forceinline__ int clamped(int index, int size) {
    return index < size ? index : size - 1;
  }

  int rows_, columns_, row_groups_, column_groups_, group_;
  A sum_[SIDE][SIDE];
};

// Row i of a head's channel map before dropout, by a warp: softmax_j(temperature <q^_i, k^_j>).
template <class T>
__device__ void channel_softmax(const Paired<T> &a, int64_t b, int h, int i, Accumulate<T> *row) {
  using A = Accumulate<T>;
  const A *dots = a.dots + ((b * a.H + h) * a.D + i) * a.D;
  const A *k_norm = a.k_norm + b * a.C + h * a.D;
  const A q_norm = a.q_norm[b * a.C + h * a.D + i];
  const A factor = a.temperature[h] * A(LOG2_E);
  for (int j = threadIdx.x % 32; j < a.D; j += 32)
    row[j] = factor * (dots[j] / (q_norm * k_norm[j]));
  softmax(row, a.D);
}

} // namespace epa::cuda
