// The Python module epa_kernels._C: the C API of kernels.h, with the GIL released. bind.h says how
// tensors come in.
#include "bind.h"

namespace {

using namespace epa::bind;
using epa::View;

const epa::Kernels *running = epa::kernels("");

void use_isa(const std::string &name) {
  const epa::Kernels *found = epa::kernels(name.c_str());
  if (!found)
    throw py::value_error("EPA_KERNELS_ISA must be one of " + std::string(epa::isas()) +
                          " on this processor, got '" + name + "'.");
  running = found;
}

template <class Op, class... Inputs> Op call(int64_t seed, int threads, const Inputs &...inputs) {
  Op a = {};
  set_inputs(a, inputs...);
  a.seed = static_cast<uint64_t>(seed), a.threads = threads;
  return a;
}

using Paired = epa::PairedAttention;
using Spatial = epa::SpatialAttention;
using Channel = epa::ChannelAttention;

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of epa_kernels for CPUs; epa_kernels/backends/cpu.py is their caller.";
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
  m.attr("inputs") = inputs();
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
                                   const Views<Paired> &view, const Weights<Paired> &weight,
                                   const Addresses<3> &kept, View y) {
    py::gil_scoped_release release;
    running->paired_attention_fwd(
        call<Paired>(seed, threads, size, kind, layout, direct, threshold, view, weight, kept), y);
  });
  m.def("paired_attention_bwd", [](const Sizes<5> &size, int kind, int layout, bool direct,
                                   std::array<uint32_t, 2> threshold, int64_t seed, int threads,
                                   const Views<Paired> &view, const Weights<Paired> &weight,
                                   const Addresses<3> &kept, View dy, const Views<Paired> &dview,
                                   const Weights<Paired> &dweight) {
    py::gil_scoped_release release;
    running->paired_attention_bwd(
        call<Paired>(seed, threads, size, kind, layout, direct, threshold, view, weight, kept), dy,
        gradients<epa::PairedAttentionGradients>(dview, dweight));
  });
  m.def("spatial_attention_fwd", [](const Sizes<5> &size, bool normalize, uint32_t threshold,
                                    int64_t seed, int threads, const Views<Spatial> &view,
                                    Address temperature, Address q_norm, View out) {
    py::gil_scoped_release release;
    running->spatial_attention_fwd(
        call<Spatial>(seed, threads, size, normalize, threshold, view, temperature, q_norm), out);
  });
  m.def("spatial_attention_bwd",
        [](const Sizes<5> &size, bool normalize, uint32_t threshold, int64_t seed, int threads,
           const Views<Spatial> &view, Address temperature, Address q_norm, View dout,
           const Views<Spatial> &dview, Address dtemperature) {
          py::gil_scoped_release release;
          running->spatial_attention_bwd(
              call<Spatial>(seed, threads, size, normalize, threshold, view, temperature, q_norm),
              dout, gradients<epa::SpatialAttentionGradients>(dview, {dtemperature}));
        });
  m.def("channel_attention_fwd",
        [](const Sizes<4> &size, uint32_t threshold, int64_t seed, int threads,
           const Views<Channel> &view, Address temperature, const Addresses<3> &kept, View out) {
          py::gil_scoped_release release;
          running->channel_attention_fwd(
              call<Channel>(seed, threads, size, threshold, view, temperature, kept), out);
        });
  m.def("channel_attention_bwd",
        [](const Sizes<4> &size, uint32_t threshold, int64_t seed, int threads,
           const Views<Channel> &view, Address temperature, const Addresses<3> &kept, View dout,
           const Views<Channel> &dview, Address dtemperature) {
          py::gil_scoped_release release;
          running->channel_attention_bwd(
              call<Channel>(seed, threads, size, threshold, view, temperature, kept), dout,
              gradients<epa::ChannelAttentionGradients>(dview, {dtemperature}));
        });
}
