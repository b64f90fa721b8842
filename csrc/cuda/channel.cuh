// Channel attention: what the generic passes over the tokens and those on tensor cores share.
//
//   forward   gram, mix_fwd, product          grid (chunks of tokens, H, B), mix (1, H, B)
//   backward  gram (of dout and v), mix_bwd, product (of three results)
//   sums      workspace (B, H, chunks, D D [+ 2 D]): left^T right, and sums of squares if
//             has_norms; added up in the order of chunks
//   product   result = tokens matrix + more factor, matrix (B, H, D, D) in the accumulation dtype:
//             gradients of <q_i, k_j> are of the order of 1/N and would underflow in float16
#pragma once
#include "heads.cuh"

namespace epa::cuda {

constexpr int CHANNEL_THREADS = 256, CHANNEL_WARPS = CHANNEL_THREADS / 32;

template <class T> struct Channel {
  using A = Accumulate<T>;
  int64_t H;
  int D, chunks; // number of the chunks of tokens that left sums
  uint32_t threshold;
  const int64_t *seed;
  const A *temperature;
  int64_t temperature_stride;
  A *gram, *q_norm, *k_norm; // (B, H, D, D), (B, H, D)
};

// Row i of a head's map: softmax_j(temperature <q^_i, k^_j>) to weights (D), columns lane, lane +
// 32, ... by each lane of a warp.
template <class T>
__device__ void channel_row(const Channel<T> &a, int64_t head, int i, Accumulate<T> t,
                            Accumulate<T> *weights) {
  using A = Accumulate<T>;
  const A *gram = a.gram + (head * a.D + i) * a.D, *k_norm = a.k_norm + head * a.D;
  const A q_norm = a.q_norm[head * a.D + i];
  const int lane = threadIdx.x % 32;
  for (int j = lane; j < a.D; j += 32)
    weights[j] = t * A(LOG2_E) * (gram[j] / (q_norm * k_norm[j]));
  softmax(weights, a.D);
}

// Of a head: gram, norms, and the map transposed (B, H, D, D).
template <class T>
__global__ void __launch_bounds__(CHANNEL_THREADS, 2)
    channel_attention_mix_fwd_kernel(Channel<T> a, const Accumulate<T> *sums,
                                     Accumulate<T> *transposed) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(A, rows); // (warps, D)
  const int64_t h = blockIdx.y, b = blockIdx.z, head = b * a.H + h;
  const int size = a.D * a.D, length = size + 2 * a.D, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < length; i += CHANNEL_THREADS) {
    A sum = 0;
    for (int64_t c = 0; c < a.chunks; ++c) sum += sums[(head * a.chunks + c) * length + i];
    if (i < size) {
      a.gram[head * size + i] = sum;
    } else {
      A *norms = i < size + a.D ? a.q_norm : a.k_norm;
      norms[head * a.D + (i - size) % a.D] = clamped_norm(sum);
    }
  }
  __syncthreads();
  const A t = a.temperature[h * a.temperature_stride];
  const A multiplier = a.threshold ? A(dropout_scale(a.threshold)) : A(1);
  const int64_t seed = a.threshold ? *a.seed : 0;
  A *weights = rows + threadIdx.x / 32 * a.D;
  for (int i = threadIdx.x / 32; i < a.D; i += CHANNEL_WARPS) {
    channel_row(a, head, i, t, weights);
    for (int j = lane; j < a.D; j += 32) {
      const bool is_dropped =
          a.threshold && !is_kept(seed, head * a.D + i, j, CHANNEL_MAP, a.threshold);
      transposed[head * size + j * a.D + i] = is_dropped ? A(0) : weights[j] * multiplier;
    }
  }
}

// Of a head: the map again, gradients of <q_i, k_j> and both transposed, d|q| / |q|, d|k| / |k| and
// the gradient of temperature (B, H).
template <class T>
__global__ void __launch_bounds__(CHANNEL_THREADS, 2)
    channel_attention_mix_bwd_kernel(Channel<T> a, const Accumulate<T> *sums,
                                     Accumulate<T> *attention, Accumulate<T> *ddots,
                                     Accumulate<T> *ddots_transposed, Accumulate<T> *dq_norm,
                                     Accumulate<T> *dk_norm, Accumulate<T> *dtemperature) {
  using A = Accumulate<T>;
  EPA_DYNAMIC_SHARED(A, rows); // (warps, D) twice
  EPA_SHARED(A, totals, [CHANNEL_WARPS]);
  const int64_t h = blockIdx.y, b = blockIdx.z, head = b * a.H + h;
  const int size = a.D * a.D, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const A t = a.temperature[h * a.temperature_stride];
  const A multiplier = a.threshold ? A(dropout_scale(a.threshold)) : A(1);
  const int64_t seed = a.threshold ? *a.seed : 0;
  A *weights = rows + warp * a.D, *dweights = rows + (CHANNEL_WARPS + warp) * a.D;
  A total = 0;
  for (int i = warp; i < a.D; i += CHANNEL_WARPS) {
    channel_row(a, head, i, t, weights);
    A along = 0;
    for (int j = lane; j < a.D; j += 32) {
      A sum = 0;
      for (int64_t c = 0; c < a.chunks; ++c)
        sum += sums[(head * a.chunks + c) * size + i * a.D + j];
      const bool is_dropped =
          a.threshold && !is_kept(seed, head * a.D + i, j, CHANNEL_MAP, a.threshold);
      dweights[j] = is_dropped ? A(0) : sum * multiplier;
      attention[head * size + i * a.D + j] = is_dropped ? A(0) : weights[j] * multiplier;
      along += weights[j] * dweights[j];
    }
    along = warp_sum(along);
    for (int j = lane; j < a.D; j += 32) {
      const A norms = a.q_norm[head * a.D + i] * a.k_norm[head * a.D + j];
      const A dlogit = weights[j] * (dweights[j] - along);
      total += dlogit * (a.gram[head * size + i * a.D + j] / norms);
      ddots[head * size + i * a.D + j] = t * dlogit / norms;
      ddots_transposed[head * size + j * a.D + i] = t * dlogit / norms;
    }
  }
  total = warp_sum(total);
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  for (int i = threadIdx.x; i < a.D; i += CHANNEL_THREADS) {
    A along_q = 0, along_k = 0;
    for (int j = 0; j < a.D; ++j) {
      const int64_t row = head * size + i * a.D + j, column = head * size + j * a.D + i;
      along_q += ddots[row] * a.gram[row];
      along_k += ddots[column] * a.gram[column];
    }
    dq_norm[head * a.D + i] = norm_gradient(along_q, a.q_norm[head * a.D + i]);
    dk_norm[head * a.D + i] = norm_gradient(along_k, a.k_norm[head * a.D + i]);
  }
  if (threadIdx.x == 0) {
    for (int i = 1; i < CHANNEL_WARPS; ++i) total += totals[i];
    dtemperature[head] = total;
  }
}

template <class T> struct ChannelProduct {
  Heads<const T> tokens;
  const Accumulate<T> *matrix;
  Heads<const T> more; // with factor (B, H, D), unless that is null
  const Accumulate<T> *factor;
  Heads<T> result;
  const Accumulate<T> *norm; // of tokens (B, H, D), where the matrix is of gradients; or null
};

template <class T> struct ChannelProducts {
  int count;
  ChannelProduct<T> product[3];
};

} // namespace epa::cuda
