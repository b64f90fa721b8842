// What one thread can do at the most: chains of multiply-adds in registers, and the kernels' own
// exp2.
#include <time.h>

#include "tile.h"

namespace epa::EPA_ISA {
namespace {

// As many independent chains as hide the latency of a multiply-add and fit the registers.
constexpr int CHAINS = 12;

double seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Best rate of `operations` over some repetitions; an empty asm keeps the values from being folded.
template <class F> double best_rate(double operations, const F &f) {
  double best = 1e9;
  for (int repetition = 0; repetition < 20; ++repetition) {
    const double start = seconds();
    f();
    const double time = seconds() - start;
    best = time < best ? time : best;
  }
  return 1e-9 * operations / best;
}

} // namespace

Peak peak() {
  constexpr int STEPS = 200000;
  Vector<float> chains[CHAINS] = {}, factor = broadcast(0.5f), term = broadcast(0.1f);
  const double fma = best_rate(2. * STEPS * CHAINS * LANES<float>, [&] {
    Vector<float> x[CHAINS];
    for (int i = 0; i < CHAINS; ++i) x[i] = chains[i];
    for (int step = 0; step < STEPS; ++step) {
#pragma GCC unroll 16
      for (int i = 0; i < CHAINS; ++i) x[i] = x[i] * factor + term;
    }
    for (int i = 0; i < CHAINS; ++i) chains[i] = x[i];
    asm volatile("" : : "r"(chains) : "memory");
  });

  constexpr int COUNT = 4096, ROUNDS = 50;
  float from[COUNT], to[COUNT];
  for (int i = 0; i < COUNT; ++i) from[i] = -0.01f * i;
  const double exponentials = best_rate(double(ROUNDS) * COUNT, [&] {
    for (int round = 0; round < ROUNDS; ++round) {
      for (int i = 0; i < COUNT; i += LANES<float>) store(to + i, exp2<float>(load(from + i)));
      asm volatile("" : : "r"(to) : "memory");
    }
  });
  return {fma, exponentials};
}

} // namespace epa::EPA_ISA
