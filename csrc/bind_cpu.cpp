// The Python module epa_kernels._C: the C API of kernels.h, with the GIL released.
//
// A tensor goes in as a tuple (address, dtype, stride, ...), strides in elements, or None where it
// is absent; what is contiguous and of the accumulation dtype by definition as an address, 0 for
// absent.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "kernels.h"
#include "view_caster.h"

namespace py = pybind11;

namespace {

using epa::View;
using Address = std::uintptr_t;
template <std::size_t n> using Addresses = std::array<Address, n>;
template <std::size_t n> using Sizes = std::array<int64_t, n>;

const epa::Kernels *running = epa::kernels("");

void use_isa(const std::string &name) {
  const epa::Kernels *found = epa::kernels(name.c_str());
  if (!found)
    throw py::value_error("EPA_KERNELS_ISA must be one of " + std::string(epa::isas()) +
                          " on this processor, got '" + name + "'.");
  running = found;
}

template <class T = void> T *pointer(Address address) { return reinterpret_cast<T *>(address); }

// weights: qkvv_weight, qkvv_bias, proj_k_bias, proj_v_bias, temperature, temperature2,
//          out_proj_weight, out_proj_bias, out_proj2_weight, out_proj2_bias
// kept:    mean, gram, projected
epa::PairedAttention paired(const Sizes<5> &size, int kind, int layout, bool direct,
                            std::array<uint32_t, 2> threshold, int64_t seed, int threads,
                            const std::array<View, 3> &view, const Addresses<10> &weight,
                            const Addresses<3> &kept) {
  epa::PairedAttention a;
  a.B = size[0], a.N = size[1], a.C = size[2], a.H = size[3], a.P = size[4];
  a.kind = static_cast<epa::Kind>(kind), a.layout = static_cast<epa::Layout>(layout);
  a.direct = direct;
  a.channel_threshold = threshold[0], a.spatial_threshold = threshold[1];
  a.seed = static_cast<uint64_t>(seed), a.threads = threads;
  a.x = view[0], a.proj_k_weight = view[1], a.proj_v_weight = view[2];
  const void **weights[] = {&a.qkvv_weight,     &a.qkvv_bias,     &a.proj_k_bias,
                            &a.proj_v_bias,     &a.temperature,   &a.temperature2,
                            &a.out_proj_weight, &a.out_proj_bias, &a.out_proj2_weight,
                            &a.out_proj2_bias};
  for (int i = 0; i < 10; ++i) *weights[i] = pointer(weight[i]);
  a.mean = pointer<double>(kept[0]), a.gram = pointer(kept[1]), a.projected = pointer(kept[2]);
  return a;
}

// Gradients go in the order of x, proj_k, proj_v and of weights.
epa::PairedAttentionGradients paired_gradients(const std::array<View, 3> &view,
                                               const Addresses<10> &to) {
  const auto at = [&](int i) { return pointer(to[i]); };
  return {view[0], view[1], view[2], at(0), at(1), at(2), at(3),
          at(4),   at(5),   at(6),   at(7), at(8), at(9)};
}

epa::SpatialAttention spatial(const Sizes<5> &size, bool normalize, uint32_t threshold,
                              int64_t seed, int threads, const std::array<View, 3> &view,
                              Address temperature, Address q_norm) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          size[4],
          normalize,
          threshold,
          static_cast<uint64_t>(seed),
          threads,
          view[0],
          view[1],
          view[2],
          pointer(temperature),
          pointer(q_norm)};
}

epa::ChannelAttention channel(const Sizes<4> &size, uint32_t threshold, int64_t seed, int threads,
                              const std::array<View, 3> &view, Address temperature,
                              const Addresses<3> &kept) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          threshold,
          static_cast<uint64_t>(seed),
          threads,
          view[0],
          view[1],
          view[2],
          pointer(temperature),
          pointer(kept[0]),
          pointer(kept[1]),
          pointer(kept[2])};
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of epa_kernels for CPUs; epa_kernels/cpp.py is their caller.";
  m.def(
      "isas", [] { return std::string(epa::isas()); },
      "Instruction sets that were built and that this processor runs, best first.");
  m.def("use_isa", &use_isa, "Choose an instruction set by name; '' for the best.");
  m.def(
      "peak",
      [] {
        epa::Peak peak;
        {
          py::gil_scoped_release release;
          peak = running->peak();
        }
        py::dict result;
        result["fma_gflops"] = peak.fma_gflops, result["exp2_gexps"] = peak.exp2_gexps;
        return result;
      },
      "Measured peak of one thread: multiply-adds (two operations each) and exponentials.");
#ifdef _OPENMP
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
#ifdef EPA_FLOAT16
  m.attr("has_float16") = true;
#else
  m.attr("has_float16") = false;
#endif

  m.def("paired_attention_fwd", [](const Sizes<5> &size, int kind, int layout, bool direct,
                                   std::array<uint32_t, 2> threshold, int64_t seed, int threads,
                                   const std::array<View, 3> &view, const Addresses<10> &weight,
                                   const Addresses<3> &kept, View y) {
    py::gil_scoped_release release;
    running->paired_attention_fwd(
        paired(size, kind, layout, direct, threshold, seed, threads, view, weight, kept), y);
  });
  m.def("paired_attention_bwd",
        [](const Sizes<5> &size, int kind, int layout, bool direct,
           std::array<uint32_t, 2> threshold, int64_t seed, int threads,
           const std::array<View, 3> &view, const Addresses<10> &weight, const Addresses<3> &kept,
           View dy, const std::array<View, 3> &dview, const Addresses<10> &dweight) {
          py::gil_scoped_release release;
          running->paired_attention_bwd(
              paired(size, kind, layout, direct, threshold, seed, threads, view, weight, kept), dy,
              paired_gradients(dview, dweight));
        });
  m.def("spatial_attention_fwd",
        [](const Sizes<5> &size, bool normalize, uint32_t threshold, int64_t seed, int threads,
           const std::array<View, 3> &view, Address temperature, Address q_norm, View out) {
          py::gil_scoped_release release;
          running->spatial_attention_fwd(
              spatial(size, normalize, threshold, seed, threads, view, temperature, q_norm), out);
        });
  m.def("spatial_attention_bwd",
        [](const Sizes<5> &size, bool normalize, uint32_t threshold, int64_t seed, int threads,
           const std::array<View, 3> &view, Address temperature, Address q_norm, View dout,
           const std::array<View, 3> &dview, Address dtemperature) {
          py::gil_scoped_release release;
          running->spatial_attention_bwd(
              spatial(size, normalize, threshold, seed, threads, view, temperature, q_norm), dout,
              {dview[0], dview[1], dview[2], pointer(dtemperature)});
        });
  m.def("channel_attention_fwd", [](const Sizes<4> &size, uint32_t threshold, int64_t seed,
                                    int threads, const std::array<View, 3> &view,
                                    Address temperature, const Addresses<3> &kept, View out) {
    py::gil_scoped_release release;
    running->channel_attention_fwd(channel(size, threshold, seed, threads, view, temperature, kept),
                                   out);
  });
  m.def("channel_attention_bwd", [](const Sizes<4> &size, uint32_t threshold, int64_t seed,
                                    int threads, const std::array<View, 3> &view,
                                    Address temperature, const Addresses<3> &kept, View dout,
                                    const std::array<View, 3> &dview, Address dtemperature) {
    py::gil_scoped_release release;
    running->channel_attention_bwd(channel(size, threshold, seed, threads, view, temperature, kept),
                                   dout, {dview[0], dview[1], dview[2], pointer(dtemperature)});
  });
}
