// What both Python modules share: how arguments come in, and the names of the tensors.
//
//   View     a tuple (address, dtype, stride, ...), strides in elements, or None where it is absent
//   Address  what is contiguous and of a known dtype, 0 where it is absent
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace pybind11::detail {

template <> struct type_caster<epa::View> {
  PYBIND11_TYPE_CASTER(epa::View, const_name("tuple"));
  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    const ssize_t size = PyTuple_Check(source.ptr()) ? PyTuple_GET_SIZE(source.ptr()) : 0;
    if (size < 2 || size > 6) return false;
    const auto at = [&](ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i)); };
    value.data = reinterpret_cast<void *>(at(0));
    value.dtype = static_cast<epa::Dtype>(at(1));
    for (ssize_t axis = 0; axis + 2 < size; ++axis) value.stride[axis] = at(axis + 2);
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

} // namespace pybind11::detail

namespace epa::bind {

namespace py = pybind11;

using Address = std::uintptr_t;
template <std::size_t n> using Addresses = std::array<Address, n>;
template <std::size_t n> using Sizes = std::array<int64_t, n>;
// The tensors of an op or their gradients, in the order of kernels.h.
template <class Tensors> using Views = std::array<View, Tensors::VIEWS>;
template <class Tensors> using Weights = std::array<Address, Tensors::WEIGHTS>;

template <class T = void> T *pointer(Address address) { return reinterpret_cast<T *>(address); }

template <class Tensors>
void set_tensors(Tensors &to, const Views<Tensors> &view, const Weights<Tensors> &weight) {
  const View *next_view = view.data();
  const Address *next_weight = weight.data();
  to.each([&](const char *, auto &tensor) {
    if constexpr (std::is_same_v<decltype(tensor), View &>)
      tensor = *next_view++;
    else
      tensor = pointer(*next_weight++);
  });
}

template <class Gradients>
Gradients gradients(const Views<Gradients> &view, const Weights<Gradients> &weight) {
  Gradients result;
  set_tensors(result, view, weight);
  return result;
}

// size: B, N, C, H, P; threshold: channel, spatial; kept: mean, gram, projected.
inline void set_inputs(PairedAttentionInputs &a, const Sizes<5> &size, int kind, int layout,
                       bool direct, std::array<uint32_t, 2> threshold,
                       const Views<PairedAttentionInputs> &view,
                       const Weights<PairedAttentionInputs> &weight, const Addresses<3> &kept) {
  a.B = size[0], a.N = size[1], a.C = size[2], a.H = size[3], a.P = size[4];
  a.kind = static_cast<Kind>(kind), a.layout = static_cast<Layout>(layout), a.direct = direct;
  a.channel_threshold = threshold[0], a.spatial_threshold = threshold[1];
  set_tensors(a, view, weight);
  a.mean = pointer<double>(kept[0]), a.gram = pointer(kept[1]), a.projected = pointer(kept[2]);
}

// size: B, N, H, D, P.
inline void set_inputs(SpatialAttentionInputs &a, const Sizes<5> &size, bool normalize,
                       uint32_t threshold, const Views<SpatialAttentionInputs> &view,
                       Address temperature, Address q_norm) {
  a.B = size[0], a.N = size[1], a.H = size[2], a.D = size[3], a.P = size[4];
  a.normalize = normalize, a.threshold = threshold;
  set_tensors(a, view, {temperature});
  a.q_norm = pointer(q_norm);
}

// size: B, N, H, D; kept: gram, q_norm, k_norm.
inline void set_inputs(ChannelAttentionInputs &a, const Sizes<4> &size, uint32_t threshold,
                       const Views<ChannelAttentionInputs> &view, Address temperature,
                       const Addresses<3> &kept) {
  a.B = size[0], a.N = size[1], a.H = size[2], a.D = size[3], a.threshold = threshold;
  set_tensors(a, view, {temperature});
  a.gram = pointer(kept[0]), a.q_norm = pointer(kept[1]), a.k_norm = pointer(kept[2]);
}

template <class Tensors> py::tuple tensor_names() {
  std::vector<std::string> views, weights;
  Tensors().each([&](const char *name, auto &tensor) {
    (std::is_same_v<decltype(tensor), View &> ? views : weights).push_back(name);
  });
  return py::make_tuple(py::tuple(py::cast(views)), py::tuple(py::cast(weights)));
}

// {op: (names of views, names of weights)}, in the order in which both are handed over.
inline py::dict inputs() {
  py::dict result;
  result["paired_attention"] = tensor_names<PairedAttentionGradients>();
  result["spatial_attention"] = tensor_names<SpatialAttentionGradients>();
  result["channel_attention"] = tensor_names<ChannelAttentionGradients>();
  return result;
}

} // namespace epa::bind
