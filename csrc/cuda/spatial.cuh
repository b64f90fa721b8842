// Spatial attention: what the generic and the specialised kernels share.
//
//   grid   (chunks of tokens, H, B); logits are scaled for exp2
//   sums   workspace: of q^2 (B, H, chunks, D) forward; of what makes the gradients of k_proj and
//          v_proj (B, H, chunks, 2, P, D) backward; added up in the order of chunks
#pragma once
#include "heads.cuh"

namespace epa::cuda {

template <class T> struct Spatial {
  using A = Accumulate<T>;
  int64_t N, H, chunk; // tokens of a chunk
  int D, P;
  bool normalize;
  uint32_t threshold;
  const int64_t *seed;
  Heads<const T> q, k_proj, v_proj;
  const A *temperature;
  int64_t temperature_stride;
  A *q_norm;
};

// norm (D), shared: |q| of the block's head from `count` sums of squares, or ones where there are
// none. The caller's next barrier makes it visible.
template <class T>
__device__ void find_norm(const Spatial<T> &a, const Accumulate<T> *squares, int count,
                          Accumulate<T> *norm) {
  using A = Accumulate<T>;
  const int64_t head = int64_t(blockIdx.z) * a.H + blockIdx.y;
  for (int d = threadIdx.x; d < a.D; d += blockDim.x) {
    A value = 1;
    if (a.normalize) {
      A square = 0;
      for (int i = 0; i < count; ++i) square += squares[(head * count + i) * a.D + d];
      value = clamped_norm(square);
    }
    norm[d] = value;
    if (blockIdx.x == 0) a.q_norm[head * a.D + d] = value;
  }
}

} // namespace epa::cuda
