#pragma once
#include "cuda_runtime.h"
#include "kernels.h"

struct __half {
  EPA_FLOAT16 value;
};

inline float __half2float(__half value) { return static_cast<float>(value.value); }
inline __half __float2half_rn(float value) { return {static_cast<EPA_FLOAT16>(value)}; }
