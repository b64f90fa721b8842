// Paired attention, the whole op: two passes over the tokens with the mix between, or the direct
// plan.
#include "paired.h"

namespace epa::EPA_ISA {
namespace {

template <class T> void forward(const PairedAttention &a, const View &y) {
  Layer<T> layer(a);
  if (a.direct) return paired_attention_direct_fwd(layer, y);
  paired_attention_summary_fwd(layer);
  paired_attention_output_fwd(layer, paired_attention_mix_fwd(layer, kept_summary(layer), false),
                              y);
}

template <class T>
void backward(const PairedAttention &a, const View &dy, const PairedAttentionGradients &grads) {
  Layer<T> layer(a);
  if (a.direct) return paired_attention_direct_bwd(layer, dy, grads);
  const Summary<T> summary = kept_summary(layer);
  const Mix<T> mix = paired_attention_mix_fwd(layer, summary, true);
  // dx itself holds its first part where it can.
  const View &dx = grads.x;
  const bool dense = dx.stride[2] == 1 && dx.stride[1] == a.C && dx.stride[0] == a.N * a.C;
  const bool same = dx.dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
  T *dx_partial =
      dense && same ? static_cast<T *>(dx.data) : layer.memory.template take<T>(a.B * a.N * a.C);
  T *sums = paired_attention_output_bwd(layer, mix, dy, dx_partial);
  paired_attention_summary_bwd(
      layer, mix, paired_attention_mix_bwd(layer, summary, mix, sums, grads), dx_partial, grads);
}

} // namespace

void paired_attention_fwd(const PairedAttention &a, View y) {
  a.x.dtype == Dtype::float64 ? forward<double>(a, y) : forward<float>(a, y);
}

void paired_attention_bwd(const PairedAttention &a, View dy,
                          const PairedAttentionGradients &grads) {
  a.x.dtype == Dtype::float64 ? backward<double>(a, dy, grads) : backward<float>(a, dy, grads);
}

} // namespace epa::EPA_ISA
