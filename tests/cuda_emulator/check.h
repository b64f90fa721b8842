// What the checks of all ops share.
#pragma once
#include "cuda_kernels.h"
#include "numbers.h"
#include "../../csrc/philox.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace check {

using namespace epa::cuda;

constexpr uint32_t THRESHOLD = 13107;
constexpr int64_t SEED = -5;

// Orders of blocks and warps that give the same bits; ThreadSanitizer, which takes its time, sees
// the races of all orders in one.
#ifdef __SANITIZE_THREAD__
constexpr int ORDERS = 1;
#else
constexpr int ORDERS = 2;
#endif

// Channels of a layer of several blocks of them, which takes the sanitizers too many threads, or time.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int64_t WIDE = 32;
#else
constexpr int64_t WIDE = 96;
#endif

inline double dropout_multiplier(int64_t row, int64_t column, uint32_t map) {
  uint16_t halves[8];
  epa::philox(SEED, row, column / 8, map, halves);
  return halves[column % 8] >= THRESHOLD ? epa::dropout_scale(THRESHOLD) : 0;
}

template <class V>
bool is_close(const char *name, const V &found, const std::vector<double> &exact,
              double tolerance) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double difference = std::abs(double(widen(found[i])) - exact[i]);
    // A NaN is the largest error.
    if (!(difference <= error)) error = std::isnan(difference) ? INFINITY : difference;
    largest = std::max(largest, std::abs(exact[i]));
  }
  if (error <= tolerance * largest) return true;
  std::printf("%s: error %g of %g\n", name, error, largest);
  return false;
}

template <class V> void append(std::vector<char> &bits, const V &values) {
  const char *bytes = reinterpret_cast<const char *>(values.data());
  bits.insert(bits.end(), bytes, bytes + values.size() * sizeof(values[0]));
}

} // namespace check
