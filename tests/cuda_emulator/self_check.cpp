// What the emulator promises, one case at a time: `self_check CASE`. Exit status 0: right, 1:
// wrong, 2: the emulator stopped the kernel and says why.
#include "launch.h"
#include "ptx.h"

#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

using namespace epa::cuda;
using T = __half;

// Small whole numbers, which no product or sum here rounds.
float number(int row, int column) { return float((7 * row + 3 * column) % 11 - 5); }

// Element (row, column) of a factor, two of which make a word.
uint32_t word_of(int row, int column, bool is_transposed) {
  return is_transposed ? pack<T>(number(row, column), number(row + 1, column))
                       : pack<T>(number(row, column), number(row, column + 1));
}

template <int K> void product_kernel(float *result) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t a[K / 4], b[K / 8];
  for (int i = 0; i < K / 4; ++i) a[i] = word_of(g + 8 * (i % 2), 2 * t + 8 * (i / 2), false);
  for (int i = 0; i < K / 8; ++i) b[i] = word_of(2 * t + 8 * i, g, true);
  float c[4] = {1, 1, 1, 1};
  mma<T>(c, a, b);
  for (int i = 0; i < 4; ++i) result[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

template <int K> bool product_is_right(void (*kernel)(float *)) {
  std::vector<float> result(16 * 8);
  EPA_LAUNCH(kernel, 1, 32, 0, nullptr, result.data());
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float sum = 1;
      for (int k = 0; k < K; ++k) sum += number(row, k) * number(k, column);
      if (result[row * 8 + column] != sum) return false;
    }
  return true;
}

void tf32_product_kernel(float *result) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float a[4], b[2];
  // What lies beyond 11 bits is not seen.
  for (int i = 0; i < 4; ++i) a[i] = std::nextafter(number(g + 8 * (i % 2), t + 4 * (i / 2)), 9.f);
  for (int i = 0; i < 2; ++i) b[i] = number(t + 4 * i, g);
  for (float &value : a) value = value < 0 ? round_tf32(value) : value;
  float c[4] = {1, 1, 1, 1};
  mma_tf32(c, a, b);
  for (int i = 0; i < 4; ++i) result[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

bool tf32_rounds_to_nearest() {
  const float step = std::ldexp(1.f, -10), half = step / 2;
  return round_tf32(1 + half) == 1 + step && round_tf32(-1 - half) == -1 - step &&
         round_tf32(1 + half - step / 8192) == 1 && std::isnan(round_tf32(NAN));
}

// Four matrices side by side, (8, 32).
void transpose_kernel(float *result) {
  EPA_SHARED(T, rows, [8 * 32]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 8 * 32; i += 32) rows[i] = narrow<T>(float(i));
  __syncthreads();
  uint32_t words[4];
  load_transposed(words, rows + lane % 8 * 32 + lane / 8 * 8);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j)
      result[(8 * i + lane / 4) * 8 + lane % 4 * 2 + j] = half_of<T>(words[i], j);
}

bool transpose_is_right() {
  std::vector<float> result(32 * 8);
  EPA_LAUNCH(transpose_kernel, 1, 32, 0, nullptr, result.data());
  for (int column = 0; column < 32; ++column)
    for (int row = 0; row < 8; ++row)
      if (result[column * 8 + row] != row * 32 + column) return false;
  return true;
}

void reverse_kernel(int *result, bool has_barrier) {
  EPA_SHARED(int, values, [96]);
  EPA_DYNAMIC_SHARED(float, dynamic);
  const int i = threadIdx.x;
  if (std::isnan(dynamic[i])) values[i] = warp_sum(1);
  if (has_barrier) __syncthreads();
  result[blockIdx.x * 96 + i] = values[95 - i];
}

// Every value once all have written; without a barrier, some block reads what is not there yet.
bool barrier_matters() {
  std::vector<int> with(5 * 96), without(5 * 96), expected(5 * 96, 32);
  EPA_LAUNCH(reverse_kernel, 5, 96, 96 * sizeof(float), nullptr, with.data(), true);
  EPA_LAUNCH(reverse_kernel, 5, 96, 96 * sizeof(float), nullptr, without.data(), false);
  return with == expected && without != expected;
}

void divergent_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

void unreached_kernel() {
  if (threadIdx.x % 2) __syncwarp();
  __syncthreads();
  __syncwarp();
}

void deadlocked_kernel() {
  if (threadIdx.x % 32 < 16) warp_sum(1);
  __syncthreads();
}

void large_kernel() {
  EPA_SHARED(char, values, [emulator::SHARED_LIMIT + 1]);
  values[0] = 0;
}

bool runs(void (*kernel)(), unsigned threads) {
  EPA_LAUNCH(kernel, 1, threads, 0, nullptr);
  return true;
}

} // namespace

int main(int, char **arguments) {
  const std::map<std::string, std::function<bool()>> cases = {
      {"product of 8", [] { return product_is_right<8>(product_kernel<8>); }},
      {"product of 16", [] { return product_is_right<16>(product_kernel<16>); }},
      {"product in tf32",
       [] { return product_is_right<8>(tf32_product_kernel) && tf32_rounds_to_nearest(); }},
      {"transpose", transpose_is_right},
      {"barrier", barrier_matters},
      {"divergent barrier", [] { return runs(divergent_kernel, 64); }},
      {"barriers of two kinds", [] { return runs(unreached_kernel, 64); }},
      {"shuffle of half a warp", [] { return runs(deadlocked_kernel, 64); }},
      {"shared memory", [] { return runs(large_kernel, 32); }},
      {"threads", [] { return runs(divergent_kernel, 1025); }},
  };
  try {
    return cases.at(arguments[1])() ? 0 : 1;
  } catch (const std::exception &error) {
    std::puts(error.what());
    return 2;
  }
}
