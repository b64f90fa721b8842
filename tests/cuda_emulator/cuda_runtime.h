// What kernels use of CUDA's language and runtime, on the emulator.
#pragma once
#include <cmath>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

// csrc/cuda/launch.h has CUDA's own forms of these three.
#define EPA_LAUNCH(kernel, grid, block, shared, stream, ...)                                       \
  (static_cast<void>(stream),                                                                      \
   emulator::run(grid, block, shared, [&] { kernel(__VA_ARGS__); }, #kernel))
#define EPA_SHARED(T, name, ...)                                                                   \
  static char name##_key;                                                                          \
  auto &name = *static_cast<T(*) __VA_ARGS__>(emulator::shared(&name##_key, sizeof(T __VA_ARGS__)))
#define EPA_DYNAMIC_SHARED(T, name) T *name = static_cast<T *>(emulator::dynamic_shared())

using cudaStream_t = void *;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "no error"; }

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads(emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::block_barrier(site);
}
inline void __syncwarp(unsigned = 0xFFFFFFFF,
                       emulator::Site site = {__builtin_FILE(), __builtin_LINE()}) {
  emulator::warp_barrier(true, site);
}
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, emulator::lane() ^ mask);
}
