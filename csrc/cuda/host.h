// What the launchers share: chunks of tokens, views as kernels take them, errors.
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda_kernels.h"
#include "heads.cuh"

namespace epa::cuda {

// A chunk is the tokens of one block. Those that leave sums: at most SUM_CHUNKS of them, enough
// blocks for a GPU and few enough to add up, each a multiple of SUM_TILE tokens.
constexpr int64_t SUM_CHUNKS = 64, SUM_TILE = 64;
constexpr int64_t OUTPUT_CHUNK = 256; // tokens, of a pass that leaves no sums
// Bytes of shared memory, for a kernel that asks for no more.
constexpr int64_t SHARED_LIMIT = 48 << 10;

struct Chunks {
  int64_t count, size; // size in tokens
};

inline Chunks sum_chunks(int64_t N, int64_t most = SUM_CHUNKS) {
  const int64_t tiles = (N + SUM_TILE - 1) / SUM_TILE;
  const int64_t size = (tiles + most - 1) / most * SUM_TILE;
  return {(N + size - 1) / size, size};
}

inline Chunks output_chunks(int64_t N) {
  return {(N + OUTPUT_CHUNK - 1) / OUTPUT_CHUNK, OUTPUT_CHUNK};
}

inline int64_t accumulate_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// f(Type<T>()) with T the element type of a dtype.
template <class T> struct Type {
  using type = T;
};
template <class F> auto with_type(Dtype dtype, F f) {
  switch (dtype) {
  case Dtype::float64:
    return f(Type<double>());
  case Dtype::bfloat16:
    return f(Type<__nv_bfloat16>());
  case Dtype::float16:
    return f(Type<__half>());
  default:
    return f(Type<float>());
  }
}

// Whether T multiplies on tensor cores.
template <class T> constexpr bool has_tensor_cores(bool tf32x3) {
  return sizeof(T) == 2 || (std::is_same_v<T, float> && tf32x3);
}

// Whether a kernel on tensor cores has head dim D, of float within 48 KB of shared memory.
template <class T> constexpr bool has_mma(int64_t D) {
  return D == 8 || D == 16 || (sizeof(T) == 2 && (D == 32 || D == 64));
}

// f(integral constant D) where there is such a kernel.
template <class T, class F> void with_head_dim(int64_t D, F f) {
  if constexpr (sizeof(T) <= 4) {
    if (D == 8) f(std::integral_constant<int, 8>());
    if (D == 16) f(std::integral_constant<int, 16>());
  }
  if constexpr (sizeof(T) == 2) {
    if (D == 32) f(std::integral_constant<int, 32>());
    if (D == 64) f(std::integral_constant<int, 64>());
  }
}

template <class T> Heads<T> heads(const View &view) {
  return {static_cast<T *>(view.data), view.stride[0], view.stride[1], view.stride[2],
          view.stride[3]};
}

// After a launch: throws if it failed. `axes` names the sizes.
inline void check_launch(const char *op, const char *kernel, const char *axes,
                         std::initializer_list<int64_t> sizes) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string message = std::string(op) + ": " + kernel + " did not start for " + axes + " =";
  for (int64_t size : sizes) message += " " + std::to_string(size);
  throw std::runtime_error(message + ": " + cudaGetErrorString(error) + ".");
}

} // namespace epa::cuda
