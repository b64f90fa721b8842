// How a View comes from Python: (address, dtype, stride, ...), or None where it is absent.
#pragma once
#include <pybind11/pybind11.h>

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
