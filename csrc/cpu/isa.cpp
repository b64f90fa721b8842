// Which instruction set runs: the sources beside this one, compiled once for each, chosen here.
#include <cstring>
#include <new>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../kernels.h"

// The entry points of one instruction set, and its table.
#define EPA_DECLARE(isa)                                                                           \
  namespace epa::isa {                                                                             \
  void paired_attention_fwd(const PairedAttention &, View);                                        \
  void paired_attention_bwd(const PairedAttention &, View, const PairedAttentionGradients &);      \
  void spatial_attention_fwd(const SpatialAttention &, View);                                      \
  void spatial_attention_bwd(const SpatialAttention &, View, const SpatialAttentionGradients &);   \
  void channel_attention_fwd(const ChannelAttention &, View);                                      \
  void channel_attention_bwd(const ChannelAttention &, View, const ChannelAttentionGradients &);   \
  Peak peak();                                                                                     \
  static const Kernels table = {paired_attention_fwd,                                              \
                                paired_attention_bwd,                                              \
                                spatial_attention_fwd,                                             \
                                spatial_attention_bwd,                                             \
                                channel_attention_fwd,                                             \
                                channel_attention_bwd,                                             \
                                peak};                                                             \
  }
EPA_DECLARE(baseline)
#if defined(__x86_64__)
EPA_DECLARE(avx2)
EPA_DECLARE(avx512)
#endif
#undef EPA_DECLARE

namespace epa {
namespace {

struct Isa {
  const char *name;
  bool runs;
  const Kernels *kernels;
};

#if defined(__x86_64__)
// Not every compiler's check knows the name.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
}
#endif

// Best first. The compiler's check includes that the operating system saves the registers.
const Isa *all(int *count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  static const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const Isa list[] = {{"avx512", has_avx512, &avx512::table},
                             {"avx2", has_avx2, &avx2::table},
                             {"baseline", true, &baseline::table}};
#else
  static const Isa list[] = {{"baseline", true, &baseline::table}};
#endif
  *count = sizeof(list) / sizeof(list[0]);
  return list;
}

} // namespace

void out_of_memory() { throw std::bad_alloc(); }

const Kernels *kernels(const char *isa) {
  int count;
  const Isa *list = all(&count);
  for (int i = 0; i < count; ++i)
    if (list[i].runs && (!*isa || !std::strcmp(isa, list[i].name))) return list[i].kernels;
  return nullptr;
}

const char *isas() {
  static char names[64];
  int count;
  const Isa *list = all(&count);
  names[0] = 0;
  for (int i = 0; i < count; ++i) {
    if (!list[i].runs) continue;
    if (*names) std::strcat(names, ",");
    std::strcat(names, list[i].name);
  }
  return names;
}

} // namespace epa
