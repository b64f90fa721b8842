// What the kernels are made of: scratch memory, parallel loops, tiles in and out, the one matrix
// product, and the spatial attention of a few tokens.
//
// Tiles are dense rows of T (float or double), a row padded to whole vectors; padding lanes hold
// anything, no lane ever reaches another one but through `pack`, `gemm` and the transposes, which
// read none of the padding. Every sum has an order that depends on shapes alone, so a result has
// the same bits for any number of threads.
#pragma once
#include <cstdlib>

#include "simd.h"

namespace epa::EPA_ISA {

// Large pieces of memory. A thread keeps those that it gave back, up to a limit: fresh ones cost a
// page fault every 4 KiB.
class Blocks {
public:
  struct Block {
    Block *next;
    int64_t bytes;
  };

  ~Blocks() {
    while (first_) std::free(take(0));
  }
  // A block of at least so many bytes, its header included.
  Block *take(int64_t bytes) {
    for (Block **link = &first_; *link; link = &(*link)->next)
      if (Block *block = *link; block->bytes >= bytes) {
        *link = block->next;
        kept_ -= block->bytes;
        return block;
      }
    const int64_t size = round_up<int64_t>(bytes > SMALLEST ? bytes : SMALLEST, SMALLEST);
    Block *block = static_cast<Block *>(std::aligned_alloc(64, size));
    if (!block) out_of_memory();
    block->bytes = size;
    return block;
  }
  void give_back(Block *block) {
    if (kept_ + block->bytes > LIMIT) return std::free(block);
    kept_ += block->bytes;
    block->next = first_;
    first_ = block;
  }

private:
#ifdef EPA_POISON
  static constexpr int64_t SMALLEST = 64, LIMIT = 0;
#else
  static constexpr int64_t SMALLEST = 1 << 18, LIMIT = 1 << 25;
#endif
  Block *first_ = nullptr;
  int64_t kept_ = 0;
};
inline thread_local Blocks blocks;

// Memory for the time of a call: pieces of a few blocks, each piece aligned to a cache line.
class Scratch {
public:
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  ~Scratch() { reset(); }

  // Uninitialised, with room for a vector that starts at the last element.
  template <class T> T *take(int64_t count) {
    return static_cast<T *>(take_bytes(count * sizeof(T)));
  }
  template <class T> T *zeros(int64_t count) {
    T *p = take<T>(count);
    std::memset(p, 0, count * sizeof(T));
    return p;
  }
  // All pieces become free.
  void reset() {
    while (first_) {
      Blocks::Block *next = first_->next;
      blocks.give_back(first_);
      first_ = next;
    }
  }

private:
  static constexpr int64_t LINE = 64;

  void *take_bytes(int64_t bytes) {
    bytes = round_up<int64_t>(bytes + VECTOR_BYTES, LINE);
    if (!first_ || used_ + bytes > first_->bytes) {
      Blocks::Block *block = blocks.take(bytes + LINE);
      block->next = first_;
      first_ = block;
      used_ = LINE;
    }
    char *p = reinterpret_cast<char *>(first_) + used_;
    used_ += bytes;
#ifdef EPA_POISON
    std::memset(p, 0xff, bytes); // NaN: what is read before it is written shows
#endif
    return p;
  }

  Blocks::Block *first_ = nullptr;
  int64_t used_ = 0;
};

// Multiply-adds below which a second thread costs more than it brings.
constexpr double GRAIN = 1 << 17;

// f(index, scratch) for index in [0, count); cost: multiply-adds of one index. The one exception
// that there is, no memory, may not leave a parallel region: it is thrown again after it.
template <class F> static void parallel_for(int64_t count, double cost, int threads, const F &f) {
#ifdef _OPENMP
  const double grains = count * cost / GRAIN;
  int team = static_cast<int>(minimum<int64_t>(threads, count));
  if (grains < team) team = static_cast<int>(grains);
  if (team > 1) {
    bool failed = false;
#pragma omp parallel num_threads(team) reduction(|| : failed)
    {
      Scratch scratch;
#pragma omp for schedule(dynamic, 1)
      for (int64_t index = 0; index < count; ++index) {
        try {
          f(index, scratch);
        } catch (...) {
          failed = true;
        }
        scratch.reset();
      }
    }
    if (failed) out_of_memory();
    return;
  }
#endif
  (void)cost, (void)threads;
  Scratch scratch;
  for (int64_t index = 0; index < count; ++index) {
    f(index, scratch);
    scratch.reset();
  }
}

// A part of a tensor as rows and columns.
struct Matrix {
  void *data;
  Dtype dtype;
  int64_t row, column; // strides in elements
};

// Rows and columns are two axes of the view, from the element at offset (in elements) on.
static inline Matrix matrix(const View &view, int row_axis, int column_axis, int64_t offset) {
  const int64_t size = view.dtype == Dtype::float64 ? 8 : view.dtype == Dtype::float32 ? 4 : 2;
  return {static_cast<char *>(view.data) + offset * size, view.dtype, view.stride[row_axis],
          view.stride[column_axis]};
}
// Whether its elements are T, so that it can be read as it lies.
template <class T> static inline bool is(const Matrix &m) {
  return m.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
}
template <class T> static inline Matrix matrix(T *data, int64_t row, int64_t column) {
  return {const_cast<typename std::remove_const<T>::type *>(data),
          sizeof(T) == 8 ? Dtype::float64 : Dtype::float32, row, column};
}

// A Matrix and a Factor go by reference: a copy would wait for every store before it.
static inline Matrix turned(const Matrix &m) { return {m.data, m.dtype, m.column, m.row}; }

// to[r * stride + c] = from(r, c) for all rows and columns, and 0 up to column `width`.
template <class T>
void pack(T *to, int64_t stride, const Matrix &from, int64_t rows, int64_t columns, int64_t width);
// to(r, c) = from[r * stride + c].
template <class T>
void unpack(const Matrix &to, const T *from, int64_t stride, int64_t rows, int64_t columns);
// to[c * to_stride + r] = from[r * from_stride + c]; reads and writes whole vectors both ways.
template <class T>
void transpose(T *to, int64_t to_stride, const T *from, int64_t from_stride, int64_t rows,
               int64_t columns);

// Tokens of one tile, and of one chunk: the part of a sum over tokens that is added up on its own.
// Both follow from the shape alone. A chunk is large enough that adding up chunks costs little.
constexpr int64_t TILE_N = 128;
static inline int64_t chunk_tokens(int64_t N) {
  return round_up<int64_t>(N / 32 > 2 * TILE_N ? N / 32 : 2 * TILE_N, TILE_N);
}

// Heads of tokens n to n + columns of a sample (N, H, D), as rows h * D + d; see pack, unpack.
template <class T>
void pack_heads(T *to, int64_t stride, const View &from, int64_t b, int64_t n, int64_t H, int64_t D,
                int64_t columns, int64_t width) {
  const int64_t head = from.stride[2], offset = b * from.stride[0] + n * from.stride[1];
  // Where heads follow each other evenly their rows are rows of one matrix, of more than D rows.
  const int64_t parts = head == D * from.stride[3] ? 1 : H;
  for (int64_t h = 0; h < parts; ++h)
    pack(to + h * D * stride, stride, matrix(from, 3, 1, offset + h * head), H * D / parts, columns,
         width);
}
template <class T>
void unpack_heads(const View &to, int64_t b, int64_t n, int64_t H, int64_t D, const T *from,
                  int64_t stride, int64_t columns) {
  const int64_t head = to.stride[2], offset = b * to.stride[0] + n * to.stride[1];
  const int64_t parts = head == D * to.stride[3] ? 1 : H;
  for (int64_t h = 0; h < parts; ++h)
    unpack(matrix(to, 3, 1, offset + h * head), from + h * D * stride, stride, H * D / parts,
           columns);
}

// Sum of term(i) for i in [0, count), in eight chains: these round less than one, and none waits
// for the addition before it.
template <class T, class F> static inline Vector<T> sum_of(int64_t count, const F &term) {
  Vector<T> sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
#pragma GCC unroll 8
    for (int chain = 0; chain < 8; ++chain) sums[chain] += term(i + chain);
  for (; i < count; ++i) sums[0] += term(i);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// a (n) . b (n), summed as Sum.
template <class Sum, class A, class B> static inline Sum dot(const A *a, const B *b, int64_t n) {
  Sum lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int lane = 0; lane < 16; ++lane) lanes[lane] += Sum(a[i + lane]) * Sum(b[i + lane]);
  for (; i < n; ++i) lanes[i % 16] += Sum(a[i]) * Sum(b[i]);
  for (int half = 8; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// total = sum of count parts, each of `size` numbers, in their order; size padded to vectors.
template <class T>
void add_parts(T *total, const T *parts, int64_t count, int64_t size, int threads) {
  constexpr int64_t STEP = 1024;
  parallel_for((size + STEP - 1) / STEP, double(count) * STEP, threads, [&](int64_t i, Scratch &) {
    const int64_t end = minimum(size, (i + 1) * STEP);
    for (int64_t at = i * STEP; at < end; at += LANES<T>) {
      Vector<T> v = load(parts + at);
      for (int64_t part = 1; part < count; ++part) v += load(parts + part * size + at);
      store(total + at, v);
    }
  });
}

// Left factor of a product: element (m, k) at data[m * row + k * column].
template <class T> struct Factor {
  const T *data;
  int64_t row, column;
};

// c (M, N) = [c +] a (M, K) b (K, N). Reads b and writes c up to the end of the last vector of a
// row.
template <class T>
void gemm(int64_t M, int64_t N, int64_t K, const Factor<T> &a, const T *b, int64_t b_stride, T *c,
          int64_t c_stride, bool accumulate = false);

// Each row of weights (rows, columns) becomes its softmax; entries are natural logits.
template <class T> void softmax_rows(T *weights, int64_t stride, int64_t rows, int64_t columns);

// Tokens that the spatial attention takes at a time: one register tile of gemm.
template <class T> constexpr int64_t BLOCK_N = GEMM_VECTORS * LANES<T>;

// S = dropout(softmax_p(q keys)) of one head, out = S values. Temperature, |q| and log2(e) are
// folded into keys.
template <class T> struct SpatialMap {
  int64_t D, P;
  const T *keys, *values; // (D, padded P)
  uint32_t threshold;
  uint64_t seed;
};

// Numbers that a block needs as scratch.
template <class T> static inline int64_t spatial_scratch(int64_t P, int64_t D) {
  return (4 * padded<T>(P) + D) * BLOCK_N<T>;
}

// q, out (D, BLOCK_N): a block of tokens in the lanes; row: of the block's first token in the map.
template <class T>
void spatial_block_fwd(const SpatialMap<T> &map, const T *q, int64_t q_stride, int64_t row, T *out,
                       int64_t out_stride, T *scratch);

// Sums over tokens, added to: (D, padded P), (D, padded P), (padded P).
template <class T> struct SpatialSums {
  T *dkeys, *dvalues, *dlogits;
};

// Lanes beyond the last token must hold dout = 0. q_centred: q for the product with dlogits,
// q itself or q minus its mean over the tokens. Writes out and dq.
template <class T>
void spatial_block_bwd(const SpatialMap<T> &map, const T *q, const T *q_centred, int64_t q_stride,
                       int64_t row, const T *dout, int64_t dout_stride, T *out, int64_t out_stride,
                       T *dq, int64_t dq_stride, SpatialSums<T> sums, T *scratch);

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;
constexpr double NORM_EPS = 1e-12;

// A = dropout(softmax_j(temperature <q^_i, k^_j>)) of one head, from dots (D, D) = <q_i, k_j>.
// Rows are `stride` apart. q_norm, k_norm (D): clamped norms. row: of the head's first one in the
// map.
template <class T> struct ChannelMap {
  int64_t D, stride;
  const T *q_norm, *k_norm;
  T temperature;
  uint32_t threshold;
  uint64_t seed, row;
};

// dots becomes the cosines; softmax before, attention after dropout; all (D, stride).
template <class T>
void channel_map_fwd(const ChannelMap<T> &map, T *dots, T *softmax, T *attention);
// dattention becomes ddots; dq_norm, dk_norm (D): d|q|/|q|, d|k|/|k|. Returns dtemperature.
template <class T>
double channel_map_bwd(const ChannelMap<T> &map, const T *cosine, const T *softmax, T *dattention,
                       T *dq_norm, T *dk_norm);

// d|q|/|q| where |q| d|q| = -along; a clamped norm passes no gradient.
template <class T> static inline T per_norm(T along, T norm) {
  return norm > T(NORM_EPS) ? -along / (norm * norm) : T(0);
}

} // namespace epa::EPA_ISA
