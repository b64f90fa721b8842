// The functions of csrc/cuda/ptx.h by the lane layouts that the PTX manual gives.
#pragma once
#include "numbers.h"

namespace epa::cuda {

inline float exp2_approximate(float x) { return std::exp2(x); }

template <class T> uint32_t pack(float low, float high) {
  const T pair[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t word;
  std::memcpy(&word, pair, sizeof word);
  return word;
}

template <class T> float half_of(uint32_t word, int index) {
  T pair[2];
  std::memcpy(pair, &word, sizeof word);
  return widen(pair[index]);
}

template <class T, int WORDS>
void multiply(float (&c)[4], const uint32_t (&a)[WORDS], const uint32_t (&b)[WORDS / 2]) {
  struct Factors {
    uint32_t a[WORDS], b[WORDS / 2];
  } mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  emulator::put(&mine, sizeof mine);
  emulator::warp_barrier(false);
  const int group = emulator::lane() / 4, pair = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * pair + i % 2;
    for (int k = 0; k < 4 * WORDS; ++k) {
      Factors of_row, of_column;
      emulator::get(row % 8 * 4 + k % 8 / 2, &of_row, sizeof of_row);
      emulator::get(column * 4 + k % 8 / 2, &of_column, sizeof of_column);
      c[i] += half_of<T>(of_row.a[row / 8 + 2 * (k / 8)], k % 2) *
              half_of<T>(of_column.b[k / 8], k % 2);
    }
  }
  emulator::warp_barrier(false);
}

template <class T> void mma(float (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  multiply<T>(c, a, b);
}
template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<T>(c, a, b);
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Without the 13 bits that no tensor core sees.
inline float seen_as_tf32(uint32_t bits) {
  bits &= 0xFFFFE000;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float round_tf32(float x) { return std::isnan(x) ? x : seen_as_tf32(bits_of(x) + 0x1000); }

inline void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  struct Factors {
    float a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  emulator::put(&mine, sizeof mine);
  emulator::warp_barrier(false);
  const int group = emulator::lane() / 4, pair = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * pair + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8; ++k) {
      Factors of_row, of_column;
      emulator::get(row % 8 * 4 + k % 4, &of_row, sizeof of_row);
      emulator::get(column * 4 + k % 4, &of_column, sizeof of_column);
      sum += double(seen_as_tf32(bits_of(of_row.a[row / 8 + 2 * (k / 4)]))) *
             seen_as_tf32(bits_of(of_column.b[k / 4]));
    }
    // Tensor cores truncate what a float does not hold.
    const float rounded = float(sum);
    c[i] = std::abs(double(rounded)) > std::abs(sum) ? std::nextafter(rounded, 0.f) : rounded;
  }
  emulator::warp_barrier(false);
}

// Matrix i lies at the addresses of lanes 8 i to 8 i + 7, a row of 8 elements of 16 bits each; a
// lane gets two neighbours of a column.
template <int MATRICES> void load_transposed(uint32_t (&result)[MATRICES], const void *address) {
  emulator::put(&address, sizeof address);
  emulator::warp_barrier(false);
  const int column = emulator::lane() / 4, row = emulator::lane() % 4 * 2;
  for (int i = 0; i < MATRICES; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const uint16_t *elements;
      emulator::get(8 * i + row + j, &elements, sizeof elements);
      pair[j] = elements[column];
    }
    std::memcpy(&result[i], pair, sizeof pair);
  }
  emulator::warp_barrier(false);
}

} // namespace epa::cuda
