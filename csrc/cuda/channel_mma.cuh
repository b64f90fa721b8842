// Channel attention's passes over the tokens on tensor cores: T of 16 bits and D in {8, 16, 32,
// 64}, or float and D in {8, 16}. channel.cuh has what lies between them, the grids and the sums.
//
//   gram     a warp owns 16 rows of left^T right; where there are fewer rows than warps, some steps
//            over the tokens of every tile too, and the parts are added up in the order of warps.
//            Sums of squares are the diagonals of left^T left and right^T right.
//   product  a warp owns 16 tokens, and its block has the matrix in shared memory, rounded to T
//   float16  gradients of <q_i, k_j> are of the order of 1 / (|q_i| |k_j|): powers of two divide a
//            channel's tokens by their norm and bring the largest of a column of the matrix to
//            where float16 has all its digits, so that a vanishing channel spoils no other.
#pragma once
#include "channel.cuh"
#include "fragments.cuh"

namespace epa::cuda {

// Rows in shared memory, transposed: 16 channels from `first` on as a factor of products over
// tokens, where D = 8 of 8 channels and zeros.
template <class T, int D>
__device__ __forceinline__ void load_channels(Word<T> (&factor)[4], const T *rows, int first) {
  if constexpr (D == 8) {
    Word<T> words[2];
    load_right(words, rows, ROW_STRIDE<D>);
    factor[0] = words[0], factor[1] = 0, factor[2] = words[1], factor[3] = 0;
  } else {
    load_left(factor, rows + first, ROW_STRIDE<D>);
  }
}

// sum += the factor by itself, 8 columns a group: its diagonal has the squares of channels.
template <class T, int GROUPS>
__device__ __forceinline__ void add_squares(float (&sum)[GROUPS][4], const Word<T> (&factor)[4]) {
#pragma unroll
  for (int i = 0; i < GROUPS; ++i) {
    const Word<T> other[2] = {factor[i], factor[i + 2]};
    mma<T>(sum[i], factor, other);
  }
}

// The diagonal to memory, by the lanes that have it.
template <int GROUPS>
__device__ __forceinline__ void store_squares(float *to, const float (&sum)[GROUPS][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if (t != g / 2) return;
#pragma unroll
  for (int i = 0; i < GROUPS; ++i) to[8 * i + g] = g % 2 ? sum[i][2 * i + 1] : sum[i][2 * i];
}

template <class T, int D>
__global__ void __launch_bounds__(MMA_THREADS, sizeof(T) == 2 ? 6 : 4)
    channel_attention_gram_mma_kernel(int64_t N, int64_t H, int64_t chunk, Heads<const T> left,
                                      Heads<const T> right, bool has_norms, float *sums) {
  constexpr int ROW_GROUPS = D == 8 ? 1 : D / 16, PARTS = MMA_WARPS / ROW_GROUPS;
  constexpr int GROUPS = D == 8 ? 1 : 2; // of 8 rows
  constexpr int TILE = TILE_ROWS * ROW_STRIDE<D>, SIZE = D * D, LENGTH = SIZE + 2 * D;
  EPA_SHARED(T, left_tile, [2 * TILE]); // and right's; later, in the same place, parts of the sums
  static_assert(PARTS * LENGTH * sizeof(float) <= 2 * TILE * sizeof(T));
  const int64_t index = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int64_t start = index * chunk, past = start + chunk, stop = past < N ? past : N;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int first = warp % ROW_GROUPS * 16, part = warp / ROW_GROUPS;
  T *right_tile = left_tile + TILE;
  float sum[D / 8][4] = {}, left_squares[GROUPS][4] = {}, right_squares[GROUPS][4] = {};
  for (int64_t n = start; n < stop; n += TILE_ROWS) {
    load_rows<T, D>(left_tile, left.row(b, n, h), left.stride_n, left.stride_d, stop - n, TILE_ROWS,
                    threadIdx.x, MMA_THREADS);
    load_rows<T, D>(right_tile, right.row(b, n, h), right.stride_n, right.stride_d, stop - n,
                    TILE_ROWS, threadIdx.x, MMA_THREADS);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < TILE_ROWS / DEPTH<T> / PARTS; ++step) {
      const int row = (step * PARTS + part) * DEPTH<T>;
      Word<T> factor[4];
      load_channels<T, D>(factor, left_tile + row * ROW_STRIDE<D>, first);
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        Word<T> other[2];
        load_right(other, right_tile + row * ROW_STRIDE<D> + 8 * c, ROW_STRIDE<D>);
        mma<T>(sum[c], factor, other);
      }
      if (has_norms) {
        add_squares<T>(left_squares, factor);
        load_channels<T, D>(factor, right_tile + row * ROW_STRIDE<D>, first);
        add_squares<T>(right_squares, factor);
      }
    }
    __syncthreads();
  }
  float *parts = reinterpret_cast<float *>(left_tile), *own = parts + part * LENGTH;
#pragma unroll
  for (int c = 0; c < D / 8; ++c)
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; ++i)
      own[(first + g + i / 2 * 8) * D + 8 * c + 2 * t + i % 2] = sum[c][i];
  store_squares(own + SIZE + first, left_squares);
  store_squares(own + SIZE + D + first, right_squares);
  __syncthreads();
  const int length = has_norms ? LENGTH : SIZE;
  sums += ((b * H + h) * gridDim.x + index) * length;
  for (int i = threadIdx.x; i < length; i += MMA_THREADS) {
    float total = parts[i];
#pragma unroll
    for (int p = 1; p < PARTS; ++p) total += parts[p * LENGTH + i];
    sums[i] = total;
  }
}

// A head's matrix, transposed and rounded to T. Where float16 takes scales, tokens are to be
// multiplied by scale (D) and results by inverse (D).
template <class T, int D>
__device__ void load_matrix(const ChannelProduct<T> &product, int64_t head, T *to, float *scale,
                            float *inverse) {
  const float *matrix = product.matrix + head * D * D;
  const bool is_scaled = std::is_same_v<T, __half> && product.norm;
  for (int j = threadIdx.x; is_scaled && j < D; j += MMA_THREADS)
    scale[j] = float16_scale(product.norm[head * D + j]);
  __syncthreads();
  for (int d = threadIdx.x; is_scaled && d < D; d += MMA_THREADS) {
    float largest = 0;
#pragma unroll 8
    for (int j = 0; j < D; ++j) largest = fmaxf(largest, fabsf(matrix[j * D + d] / scale[j]));
    inverse[d] = 1 / float16_scale(largest);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < D * D; i += MMA_THREADS) {
    const int j = i / D, d = i % D;
    to[d * ROW_STRIDE<D> + j] =
        narrow<T>(is_scaled ? matrix[i] / scale[j] / inverse[d] : matrix[i]);
  }
  __syncthreads();
}

template <class T, int D>
__global__ void __launch_bounds__(MMA_THREADS, 6)
    channel_attention_product_mma_kernel(int64_t N, int64_t H, int64_t chunk,
                                         ChannelProducts<T> products) {
  constexpr int WARP_TILE = WARP_ROWS * ROW_STRIDE<D>;
  EPA_SHARED(T, matrix, [D * ROW_STRIDE<D>]);
  EPA_SHARED(T, tiles, [2 * MMA_WARPS * WARP_TILE]); // of each warp: tokens, and what factor takes
  EPA_SHARED(float, scale, [D]);
  EPA_SHARED(float, inverse, [D]);
  const int64_t index = blockIdx.x / products.count, h = blockIdx.y, b = blockIdx.z;
  const ChannelProduct<T> &product = products.product[blockIdx.x % products.count];
  const int64_t start = index * chunk, past = start + chunk, stop = past < N ? past : N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t head = b * H + h;
  const bool is_scaled = std::is_same_v<T, __half> && product.norm;
  T *tile = tiles + 2 * warp * WARP_TILE, *more = tile + WARP_TILE;
  load_matrix<T, D>(product, head, matrix, scale, inverse);
  for (int64_t n = start + warp * WARP_ROWS; n < stop; n += TILE_ROWS) {
    load_rows<T, D>(tile, product.tokens.row(b, n, h), product.tokens.stride_n,
                    product.tokens.stride_d, stop - n, WARP_ROWS, lane, 32);
    if (product.factor)
      load_rows<T, D>(more, product.more.row(b, n, h), product.more.stride_n, product.more.stride_d,
                      stop - n, WARP_ROWS, lane, 32);
    __syncwarp();
    float sum[D / 8][4] = {};
    add_transposed<T, D>(sum, is_scaled ? row_factor<T, D>(tile, scale) : row_factor<T, D>(tile),
                         matrix);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = n + g + 8 * r;
      if (row >= stop) continue;
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        const int d = 8 * c + 2 * t;
        float value[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          value[i] = sum[c][2 * r + i] * (is_scaled ? inverse[d + i] : 1.f);
          if (product.factor)
            value[i] +=
                widen(more[(g + 8 * r) * ROW_STRIDE<D> + d + i]) * product.factor[head * D + d + i];
        }
        store_pair(product.result.row(b, row, h), product.result.stride_d, d, value[0], value[1]);
      }
    }
    __syncwarp();
  }
}

} // namespace epa::cuda
