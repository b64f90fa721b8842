// What the launchers share: chunks of tokens, views as kernels take them, errors.
#pragma once
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cuda_kernels.h"
#include "heads.cuh"

namespace epa::cuda {

// Chunks that leave sums: enough blocks for a GPU, few enough to add up.
constexpr int64_t SUM_CHUNKS = 64, SUM_TILE = 64;
constexpr int64_t OUTPUT_CHUNK = 256;
// Of shared memory, for a kernel that asks for no more.
constexpr int64_t SHARED_LIMIT = 48 << 10;

struct Chunks {
  int64_t count, size;
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
template <class T> struct Type { using type = T; };
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

// f(integral constant D) where kernels on tensor cores have D.
template <class F> void with_head_dim(int64_t D, F f) {
  switch (D) {
  case 8:
    return f(std::integral_constant<int, 8>());
  case 16:
    return f(std::integral_constant<int, 16>());
  case 32:
    return f(std::integral_constant<int, 32>());
  default:
    return f(std::integral_constant<int, 64>());
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
