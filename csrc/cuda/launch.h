// Launches and shared memory in the form that nvcc and the emulator of the tests both take.
#pragma once
#include <cuda_runtime.h>

// The emulator's cuda_runtime.h has forms of its own.
#ifdef __CUDACC__
#define EPA_LAUNCH(kernel, grid, block, shared, stream, ...)                                       \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define EPA_SHARED(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define EPA_DYNAMIC_SHARED(T, name)                                                                \
  extern __shared__ __align__(16) unsigned char epa_dynamic_shared[];                              \
  T *name = reinterpret_cast<T *>(epa_dynamic_shared)
#endif
