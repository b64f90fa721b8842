// Runs CUDA C++ kernels on a CPU, compiled by a plain C++17 compiler; for tests only.
//
// A CUDA thread is a fiber. A block's warps advance one at a time, in random order, each as far as
// its barriers let it: the widest skew that CUDA allows. Shared memory is fresh for each block and
// full of NaN. Threads that wait at different barriers, or for threads that are gone, are an error.
//
// The runtime, emulator.cpp, is compiled without -fsanitize=thread, with -DEMULATOR_TSAN instead:
// ThreadSanitizer then sees what the kernel itself reads and writes, each CUDA thread as a thread,
// ordered by __syncthreads, __syncwarp and atomics alone. Shuffles and mma order nothing.
//
// Limits: no time, no bank conflicts; a fused multiply-add may differ in the last bit.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace emulator {

constexpr size_t SHARED_LIMIT = 48 << 10; // of a kernel that asks for no more
constexpr int MAILBOX = 64;               // bytes that a lane shows its warp

// Number of the planted bug that is on, or -1; the sources of the tests' copies ask for it.
inline int planted = -1;

// Of warps, lanes and blocks; every launch starts from it.
void set_seed(uint64_t seed);

// Throws std::runtime_error for a launch that CUDA refuses, and for divergence and deadlock.
void run(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()> &kernel,
         const char *name);

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();

// Where a barrier stands in the sources: a compiler may copy its call, so no address tells.
struct Site {
  const char *file;
  int line;
};
void block_barrier(Site site);
void warp_barrier(bool orders_memory, Site site = {__builtin_FILE(), __builtin_LINE()});

// What a lane shows the others of its warp, between two warp barriers.
void put(const void *value, int bytes);
void get(int lane, void *value, int bytes);

// Static shared memory of the running block, one piece for each key, and its dynamic memory.
void *shared(const void *key, size_t bytes);
void *dynamic_shared();

template <class T> T exchange(T value, int source) {
  static_assert(sizeof(T) <= MAILBOX);
  put(&value, sizeof value);
  warp_barrier(false);
  T result;
  get(source, &result, sizeof result);
  warp_barrier(false);
  return result;
}

} // namespace emulator
