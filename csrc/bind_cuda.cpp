// The Python module epa_kernels._C_cuda: the C API of cuda_kernels.h, with the GIL released.
//
// A class holds the arguments of an op; its methods launch it. bind.h says how tensors come in; a
// stream comes in as an address.
#include "bind.h"
#include "cuda/cuda_kernels.h"

#include <utility>

namespace {

using namespace epa::bind;
using namespace epa::cuda;
using epa::View;
// Threshold and seed; address and stride over heads.
using Dropout = std::pair<uint32_t, Address>;
using Temperature = std::pair<Address, int64_t>;
using Release = py::call_guard<py::gil_scoped_release>;

template <class Op> void set_launch(Op &a, bool tf32x3, Address seed, Address stream) {
  a.tf32x3 = tf32x3, a.seed = pointer<const int64_t>(seed), a.stream = pointer(stream);
}

PairedAttention paired(const Sizes<5> &size, int kind, int layout, bool direct,
                       std::array<uint32_t, 2> threshold, Address seed, int weight_dtype,
                       bool tf32x3, const Views<PairedAttention> &view,
                       const Weights<PairedAttention> &weight, const Addresses<3> &kept,
                       Address stream) {
  PairedAttention a = {};
  set_inputs(a, size, kind, layout, direct, threshold, view, weight, kept);
  set_launch(a, tf32x3, seed, stream);
  a.weight_dtype = static_cast<epa::Dtype>(weight_dtype);
  return a;
}

SpatialAttention spatial(const Sizes<5> &size, bool normalize, bool tf32x3, Dropout dropout,
                         const Views<SpatialAttention> &view, Temperature temperature,
                         Address q_norm, Address stream) {
  SpatialAttention a = {};
  set_inputs(a, size, normalize, dropout.first, view, temperature.first, q_norm);
  set_launch(a, tf32x3, dropout.second, stream);
  a.temperature_stride = temperature.second;
  return a;
}

ChannelAttention channel(const Sizes<4> &size, bool tf32x3, Dropout dropout,
                         const Views<ChannelAttention> &view, Temperature temperature,
                         const Addresses<3> &kept, Address stream) {
  ChannelAttention a = {};
  set_inputs(a, size, dropout.first, view, temperature.first, kept);
  set_launch(a, tf32x3, dropout.second, stream);
  a.temperature_stride = temperature.second;
  return a;
}

// An op's arguments, with the workspace to come.
template <class Op, class Init> py::class_<Op> op(py::module_ &m, const char *name, Init init) {
  // Local: the emulator's module of the tests has the same classes.
  return py::class_<Op>(m, name, py::module_local())
      .def(py::init(init))
      .def_property(
          "workspace", [](const Op &a) { return reinterpret_cast<Address>(a.workspace); },
          [](Op &a, Address address) { a.workspace = pointer(address); });
}

} // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Kernels of epa_kernels for NVIDIA GPUs; epa_kernels/backends/cuda.py is their caller.";
  // Compute capabilities, 80 for 8.0, and that of the PTX for what comes after.
  m.attr("architectures") = std::vector<int>{EPA_ARCHITECTURES};
  m.attr("ptx") = EPA_PTX;
  m.attr("inputs") = inputs();
  m.attr("cuda_version") = EPA_CUDA_VERSION; // as CUDART_VERSION
  op<PairedAttention>(m, "PairedAttention", &paired)
      .def("fwd_workspace", &paired_attention_fwd_workspace)
      .def("bwd_workspace", &paired_attention_bwd_workspace)
      .def(
          "fwd", [](const PairedAttention &a, Address y) { paired_attention_fwd(a, pointer(y)); },
          Release())
      .def(
          "bwd",
          [](const PairedAttention &a, Address dy, const Views<PairedAttention> &view,
             const Weights<PairedAttention> &weight) {
            paired_attention_bwd(a, pointer(dy),
                                 gradients<epa::PairedAttentionGradients>(view, weight));
          },
          Release());
  op<SpatialAttention>(m, "SpatialAttention", &spatial)
      .def("fwd_workspace", &spatial_attention_fwd_workspace)
      .def("bwd_workspace", &spatial_attention_bwd_workspace)
      .def("fwd", &spatial_attention_fwd, Release())
      .def(
          "bwd",
          [](const SpatialAttention &a, View dout, const Views<SpatialAttention> &view,
             Address dtemperature) {
            spatial_attention_bwd(a, dout,
                                  gradients<epa::SpatialAttentionGradients>(view, {dtemperature}));
          },
          Release());
  op<ChannelAttention>(m, "ChannelAttention", &channel)
      .def("fwd_workspace", &channel_attention_fwd_workspace)
      .def("bwd_workspace", &channel_attention_bwd_workspace)
      .def("fwd", &channel_attention_fwd, Release())
      .def(
          "bwd",
          [](const ChannelAttention &a, View dout, const Views<ChannelAttention> &view,
             Address dtemperature) {
            channel_attention_bwd(a, dout,
                                  gradients<epa::ChannelAttentionGradients>(view, {dtemperature}));
          },
          Release());
}
