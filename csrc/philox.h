// Random bits for attention dropout: Philox4x32-10. The reference is epa_kernels/rng.py.
//
//   counter (column / 8, row mod 2^32, row / 2^32, map), key = seed; eight 16-bit halves a counter
//   keep = half >= threshold = round(p * 65536), multiplier = 65536 / (65536 - threshold)
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define EPA_HD __host__ __device__
#else
#define EPA_HD
#endif

namespace epa {

constexpr uint32_t CHANNEL_MAP = 0, SPATIAL_MAP = 1;
constexpr int64_t COLUMNS_PER_COUNTER = 8;
constexpr uint32_t PHILOX_M0 = 0xD2511F53, PHILOX_M1 = 0xCD9E8D57;
constexpr uint32_t PHILOX_W0 = 0x9E3779B9, PHILOX_W1 = 0xBB67AE85;

// The four words of one counter, two columns each, the first in the low half.
EPA_HD static inline void philox_words(uint64_t seed, uint64_t row, uint32_t group, uint32_t map,
                                       uint32_t c[4]) {
  c[0] = group, c[1] = (uint32_t)row, c[2] = (uint32_t)(row >> 32), c[3] = map;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = (uint64_t)c[0] * PHILOX_M0, product1 = (uint64_t)c[2] * PHILOX_M1;
    const uint32_t next[4] = {(uint32_t)(product1 >> 32) ^ c[1] ^ k0, (uint32_t)product1,
                              (uint32_t)(product0 >> 32) ^ c[3] ^ k1, (uint32_t)product0};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k0 += PHILOX_W0, k1 += PHILOX_W1;
  }
}

// Its eight halves, column by column.
EPA_HD static inline void philox(uint64_t seed, uint64_t row, uint32_t group, uint32_t map,
                                 uint16_t halves[8]) {
  uint32_t c[4];
  philox_words(seed, row, group, map, c);
  for (int i = 0; i < 4; ++i) {
    halves[2 * i] = (uint16_t)c[i];
    halves[2 * i + 1] = (uint16_t)(c[i] >> 16);
  }
}

EPA_HD static inline double dropout_scale(uint32_t threshold) {
  return 65536.0 / (65536 - threshold);
}

} // namespace epa
