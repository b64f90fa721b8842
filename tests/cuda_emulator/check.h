// What the checks of all ops share. A check runs an op on the emulator, in memory that ends where
// the tensors end; compares it with its reference in double, and its bits between two orders of
// blocks and warps. Small grids: ThreadSanitizer counts at most some thousand threads a launch.
#pragma once
#include "cuda_kernels.h"
#include "numbers.h"
#include "../../csrc/philox.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <random>
#include <string>
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

// Channels of a layer of several blocks of them, which takes the sanitizers too many threads, or
// time.
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

// Arguments are the names of checks, or none for all; before them --planted and a bug's number.
// Exit status 0: right, 1: wrong, 2: refused by the emulator.
inline int run_checks(int count, char **arguments,
                      const std::map<std::string, std::function<bool()>> &checks) {
  std::vector<std::string> names(arguments + 1, arguments + count);
  if (names.size() > 1 && names[0] == "--planted") {
    emulator::planted = std::stoi(names[1]);
    names.erase(names.begin(), names.begin() + 2);
  }
  try {
    bool right = true;
    for (const auto &[name, is_right] : checks)
      if (names.empty() || std::find(names.begin(), names.end(), name) != names.end())
        right = is_right() && right;
    return right ? 0 : 1;
  } catch (const std::exception &error) {
    std::puts(error.what());
    return 2;
  }
}

} // namespace check
