// The dtypes of the kernels, and the arithmetic that all of them share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace epa::cuda {

constexpr double LOG2_E = 1.4426950408889634, NORM_EPS = 1e-12;

// What sums, norms and softmaxes are taken in.
template <class T> using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

template <class T> __device__ __forceinline__ T narrow(Accumulate<T> value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(value);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(value);
  else
    return value;
}

// NaN where it is NaN.
template <class A> __device__ __forceinline__ A clamped_norm(A square) {
  const A norm = sqrt(square);
  return norm < A(NORM_EPS) ? A(NORM_EPS) : norm;
}

// d|q| / |q| where |q| d|q| = -along; a clamped norm passes no gradient.
template <class A> __device__ __forceinline__ A norm_gradient(A along, A norm) {
  return norm > A(NORM_EPS) ? -along / (norm * norm) : A(0);
}

template <class A> __device__ __forceinline__ A warp_max(A value, int lanes = 32) {
  for (int mask = 1; mask < lanes; mask *= 2) {
    const A other = __shfl_xor_sync(0xFFFFFFFF, value, mask);
    value = value > other ? value : other;
  }
  return value;
}

template <class A> __device__ __forceinline__ A warp_sum(A value, int lanes = 32) {
  for (int mask = 1; mask < lanes; mask *= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, mask);
  return value;
}

} // namespace epa::cuda
