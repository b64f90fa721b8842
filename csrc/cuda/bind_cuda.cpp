// The Python module epa_kernels._C_cuda: the C API of cuda_kernels.h, with the GIL released.
//
// A class holds the arguments of an op; its methods launch it. A tensor goes in as bind_cpu.cpp
// says, a stream as an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "../view_caster.h"
#include "cuda_kernels.h"

namespace py = pybind11;

namespace {

using namespace epa::cuda;
using epa::View;
using Address = std::uintptr_t;
template <std::size_t n> using Addresses = std::array<Address, n>;
template <std::size_t n> using Sizes = std::array<int64_t, n>;
template <std::size_t n> using Views = std::array<View, n>;
// Threshold and seed; address and stride over heads.
using Dropout = std::pair<uint32_t, Address>;
using Temperature = std::pair<Address, int64_t>;
using Release = py::call_guard<py::gil_scoped_release>;

template <class T = void> T *pointer(Address address) { return reinterpret_cast<T *>(address); }

// size:   B, N, C, H, P
// weight: qkvv_weight, qkvv_bias, proj_k_bias, proj_v_bias, temperature, temperature2,
//         out_proj_weight, out_proj_bias, out_proj2_weight, out_proj2_bias
// kept:   mean, gram, projected
PairedAttention paired(const Sizes<5> &size, int kind, int layout, bool direct,
                       std::array<uint32_t, 2> threshold, Address seed, int weight_dtype,
                       bool tf32x3, const Views<3> &view, const Addresses<10> &weight,
                       const Addresses<3> &kept, Address stream) {
  PairedAttention a = {};
  a.B = size[0], a.N = size[1], a.C = size[2], a.H = size[3], a.P = size[4];
  a.kind = static_cast<epa::Kind>(kind), a.layout = static_cast<epa::Layout>(layout);
  a.direct = direct;
  a.channel_threshold = threshold[0], a.spatial_threshold = threshold[1];
  a.seed = pointer<const int64_t>(seed);
  a.weight_dtype = static_cast<epa::Dtype>(weight_dtype), a.tf32x3 = tf32x3;
  a.x = view[0], a.proj_k_weight = view[1], a.proj_v_weight = view[2];
  const void **weights[] = {&a.qkvv_weight,     &a.qkvv_bias,     &a.proj_k_bias,
                            &a.proj_v_bias,     &a.temperature,   &a.temperature2,
                            &a.out_proj_weight, &a.out_proj_bias, &a.out_proj2_weight,
                            &a.out_proj2_bias};
  for (int i = 0; i < 10; ++i) *weights[i] = pointer(weight[i]);
  a.mean = pointer<double>(kept[0]), a.gram = pointer(kept[1]), a.projected = pointer(kept[2]);
  a.stream = pointer(stream);
  return a;
}

// size: B, N, H, D, P; view: q, k_proj, v_proj.
SpatialAttention spatial(const Sizes<5> &size, bool normalize, bool tf32x3, Dropout dropout,
                         const Views<3> &view, Temperature temperature, Address q_norm,
                         Address stream) {
  SpatialAttention a = {};
  a.B = size[0], a.N = size[1], a.H = size[2], a.D = size[3], a.P = size[4];
  a.normalize = normalize, a.tf32x3 = tf32x3;
  a.threshold = dropout.first, a.seed = pointer<const int64_t>(dropout.second);
  a.q = view[0], a.k_proj = view[1], a.v_proj = view[2];
  a.temperature = pointer(temperature.first), a.temperature_stride = temperature.second;
  a.q_norm = pointer(q_norm), a.stream = pointer(stream);
  return a;
}

// size: B, N, H, D; view: q, k, v; kept: gram, q_norm, k_norm.
ChannelAttention channel(const Sizes<4> &size, bool tf32x3, Dropout dropout, const Views<3> &view,
                         Temperature temperature, const Addresses<3> &kept, Address stream) {
  ChannelAttention a = {};
  a.B = size[0], a.N = size[1], a.H = size[2], a.D = size[3], a.tf32x3 = tf32x3;
  a.threshold = dropout.first, a.seed = pointer<const int64_t>(dropout.second);
  a.q = view[0], a.k = view[1], a.v = view[2];
  a.temperature = pointer(temperature.first), a.temperature_stride = temperature.second;
  a.gram = pointer(kept[0]), a.q_norm = pointer(kept[1]), a.k_norm = pointer(kept[2]);
  a.stream = pointer(stream);
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
  m.doc() = "Kernels of epa_kernels for NVIDIA GPUs; epa_kernels/cuda.py is their caller.";
  // Compute capabilities, 80 for 8.0, and that of the PTX for what comes after.
  m.attr("architectures") = std::vector<int>{EPA_ARCHITECTURES};
  m.attr("ptx") = EPA_PTX;
  m.attr("cuda_version") = EPA_CUDA_VERSION; // as CUDART_VERSION
  op<PairedAttention>(m, "PairedAttention", &paired)
      .def("fwd_workspace", &paired_attention_fwd_workspace)
      .def("bwd_workspace", &paired_attention_bwd_workspace)
      .def(
          "fwd", [](const PairedAttention &a, Address y) { paired_attention_fwd(a, pointer(y)); },
          Release())
      .def(
          "bwd",
          // Gradients go in the order of view and of weight.
          [](const PairedAttention &a, Address dy, const Views<3> &view, const Addresses<10> &to) {
            const auto at = [&](int i) { return pointer(to[i]); };
            paired_attention_bwd(a, pointer(dy),
                                 {view[0], view[1], view[2], at(0), at(1), at(2), at(3), at(4),
                                  at(5), at(6), at(7), at(8), at(9)});
          },
          Release());
  op<SpatialAttention>(m, "SpatialAttention", &spatial)
      .def("fwd_workspace", &spatial_attention_fwd_workspace)
      .def("bwd_workspace", &spatial_attention_bwd_workspace)
      .def("fwd", &spatial_attention_fwd, Release())
      .def(
          "bwd",
          [](const SpatialAttention &a, View dout, const Views<3> &to, Address dtemperature) {
            spatial_attention_bwd(a, dout, {to[0], to[1], to[2], pointer(dtemperature)});
          },
          Release());
  op<ChannelAttention>(m, "ChannelAttention", &channel)
      .def("fwd_workspace", &channel_attention_fwd_workspace)
      .def("bwd_workspace", &channel_attention_bwd_workspace)
      .def("fwd", &channel_attention_fwd, Release())
      .def(
          "bwd",
          [](const ChannelAttention &a, View dout, const Views<3> &to, Address dtemperature) {
            channel_attention_bwd(a, dout, {to[0], to[1], to[2], pointer(dtemperature)});
          },
          Release());
}
