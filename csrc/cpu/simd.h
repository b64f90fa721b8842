// Vectors of the instruction set that this object is compiled for: generic GCC/Clang vectors, no
// intrinsics but one multiplication. Every .cpp of this folder but isa.cpp is compiled once for
// each instruction set, with EPA_ISA naming it, and lives in a namespace of that name.
//
// Nothing here may use inline functions or templates of the standard library: the linker keeps one
// copy of those, and it could be one with instructions that the processor lacks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../kernels.h"
#include "../philox.h"

#ifndef EPA_ISA
#define EPA_ISA baseline
#endif

namespace epa::EPA_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, GEMM_ROWS = 8;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, GEMM_ROWS = 4;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, GEMM_ROWS = 8;
#else
constexpr int VECTOR_BYTES = 16, GEMM_ROWS = 4;
#endif
// Vectors a register tile of gemm is wide.
constexpr int GEMM_VECTORS = 2;

template <class T> struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  // For memory: an access through this type, unlike memcpy, is one instruction under gcc 12.
  typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(T);
// Integers as wide as T, which comparisons give and exponents are built from.
template <class T> struct IntegerOf;
template <> struct IntegerOf<float> {
  typedef int32_t type;
};
template <> struct IntegerOf<double> {
  typedef int64_t type;
};
template <class T> using IntegerVector = Vector<typename IntegerOf<T>::type>;

template <class T> static inline Vector<T> load(const T *p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned *>(p);
}
template <class T> static inline void store(T *p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned *>(p) = v;
}
template <class T> static inline Vector<T> broadcast(T x) { return x - Vector<T>{}; }
// NaN in b is kept, NaN in a is not.
template <class V> static inline V maximum(V a, V b) { return a > b ? a : b; }

static inline float square_root(float x) { return __builtin_sqrtf(x); }
static inline double square_root(double x) { return __builtin_sqrt(x); }

template <class T> constexpr T minimum(T a, T b) { return a < b ? a : b; }
template <class T> constexpr T round_up(T n, T multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
template <class T> constexpr int64_t padded(int64_t n) { return round_up<int64_t>(n, LANES<T>); }

// Coefficients of 2^f, f in [-0.5, 0.5], from f^1 on.
// float: minimax of the relative error, 8.7e-8. double: ln(2)^k / k!, error 2e-16.
template <class T> struct Exp2;
template <> struct Exp2<float> {
  static constexpr float coefficients[] = {6.931469302e-01f, 2.402223191e-01f, 5.550779325e-02f,
                                           9.671999181e-03f, 1.325460243e-03f};
  static constexpr float magic = 12582912.f + 127, lowest = -126; // 1.5 * 2^23 + bias
  static constexpr int mantissa = 23;
};
template <> struct Exp2<double> {
  static constexpr double coefficients[] = {
      6.9314718055994530942e-01, 2.4022650695910071233e-01, 5.5504108664821579953e-02,
      9.6181291076284771619e-03, 1.3333558146428443423e-03, 1.5403530393381609954e-04,
      1.5252733804059840280e-05, 1.3215486790144309488e-06, 1.0178086009239699728e-07,
      7.0549116208011233299e-09, 4.4455382718708116108e-10, 2.5678435993488202527e-11,
      1.3691488853904128880e-12};
  static constexpr double magic = 6755399441055744.0 + 1023, lowest = -1022;
  static constexpr int mantissa = 52;
};

// 2^x for x <= 0; below the smallest normal number that number. NaN stays NaN.
template <class T> static inline Vector<T> exp2(Vector<T> x) {
  typedef Exp2<T> E;
  x = maximum(broadcast(E::lowest), x);
  const Vector<T> shifted = x + broadcast(E::magic);
  const Vector<T> f = x - (shifted - broadcast(E::magic));
  const Vector<T> scale = (Vector<T>)((IntegerVector<T>)shifted << E::mantissa);
  constexpr int degree = sizeof(E::coefficients) / sizeof(T);
  Vector<T> p = broadcast(E::coefficients[degree - 1]);
#pragma GCC unroll 16
  for (int k = degree - 2; k >= 0; --k) p = p * f + broadcast(E::coefficients[k]);
  p = p * f + broadcast(T(1));
  // A product, not a sum of exponents: the bits of a NaN must not become a number.
  return p * scale;
}

template <class T> static inline T sum(Vector<T> v) {
  T total = 0;
  for (int i = 0; i < LANES<T>; ++i) total += v[i];
  return total;
}

// Lane i is a[i] where i & S is 0, else b[i - S] (low) or, for the other result, a[i + S], b[i].
template <int S, class V, std::size_t... I>
static inline void exchange(V &a, V &b, std::index_sequence<I...>) {
  constexpr int n = sizeof...(I);
#if defined(__clang__) || __GNUC__ >= 12
  const V low = __builtin_shufflevector(a, b, (I & S ? n + I - S : I)...);
  const V high = __builtin_shufflevector(a, b, (I & S ? n + I : I + S)...);
#else
  typedef decltype(a < b) Mask;
  const V low = __builtin_shuffle(a, b, Mask{(I & S ? n + I - S : I)...});
  const V high = __builtin_shuffle(a, b, Mask{(I & S ? n + I : I + S)...});
#endif
  a = low, b = high;
}

template <int S, class T> static inline void transpose_stages(Vector<T> *rows) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES<T>; ++i)
      if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<LANES<T>>());
    transpose_stages<S / 2, T>(rows);
  }
}

// A square of LANES x LANES numbers, in registers.
template <class T> static inline void transpose_square(Vector<T> *rows) {
  transpose_stages<LANES<T> / 2, T>(rows);
}

// Product of the lower halves of 64-bit lanes; the upper halves of a and b count for nothing.
static inline Vector<uint64_t> multiply_halves(Vector<uint64_t> a, Vector<uint64_t> b) {
#if defined(__AVX512F__)
  // The masked form: gcc 12 warns of the plain one's own undefined operand.
  return (Vector<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Vector<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  const Vector<uint64_t> low = Vector<uint64_t>{} + 0xffffffffu;
  return (a & low) * (b & low);
#endif
}

} // namespace epa::EPA_ISA
