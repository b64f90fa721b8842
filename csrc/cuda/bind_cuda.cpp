// The Python module epa_kernels._C_cuda: the C API of cuda_kernels.h, with the GIL released.
//
// A tensor goes in as bind_cpu.cpp says; a stream as an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../view_caster.h"
#include "cuda_kernels.h"

namespace py = pybind11;

namespace {

using epa::View;
using Address = std::uintptr_t;

template <class T = void> T *pointer(Address address) { return reinterpret_cast<T *>(address); }

// size: B, N, H, D, P.
epa::cuda::SpatialAttention spatial(const std::array<int64_t, 5> &size, bool normalize,
                                    uint32_t threshold, Address seed,
                                    const std::array<View, 3> &view, Address temperature,
                                    int64_t temperature_stride, Address q_norm, Address workspace,
                                    Address stream) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          size[4],
          normalize,
          threshold,
          pointer<const int64_t>(seed),
          view[0],
          view[1],
          view[2],
          pointer(temperature),
          temperature_stride,
          pointer(q_norm),
          pointer(workspace),
          pointer(stream)};
}

// size: B, N, H, D; kept: gram, q_norm, k_norm.
epa::cuda::ChannelAttention channel(const std::array<int64_t, 4> &size, uint32_t threshold,
                                    Address seed, const std::array<View, 3> &view,
                                    Address temperature, int64_t temperature_stride,
                                    const std::array<Address, 3> &kept, Address workspace,
                                    Address stream) {
  return {size[0],
          size[1],
          size[2],
          size[3],
          threshold,
          pointer<const int64_t>(seed),
          view[0],
          view[1],
          view[2],
          pointer(temperature),
          temperature_stride,
          pointer(kept[0]),
          pointer(kept[1]),
          pointer(kept[2]),
          pointer(workspace),
          pointer(stream)};
}

// Of the workspaces' sizes, which depend on no address.
epa::cuda::SpatialAttention spatial_sizes(const std::array<int64_t, 5> &size, bool normalize,
                                          int dtype) {
  View view = {};
  view.dtype = static_cast<epa::Dtype>(dtype);
  return spatial(size, normalize, 0, 0, {view, view, view}, 0, 0, 0, 0, 0);
}

epa::cuda::ChannelAttention channel_sizes(const std::array<int64_t, 4> &size, int dtype) {
  View view = {};
  view.dtype = static_cast<epa::Dtype>(dtype);
  return channel(size, 0, 0, {view, view, view}, 0, 0, {}, 0, 0);
}

} // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Kernels of epa_kernels for NVIDIA GPUs; epa_kernels/cuda.py is their caller.";
  // Compute capabilities, 80 for 8.0; of the highest there is PTX, too.
  m.attr("architectures") = std::vector<int>{EPA_ARCHITECTURES};
  m.attr("cuda_version") = EPA_CUDA_VERSION; // as CUDART_VERSION
  m.def("spatial_attention_fwd_workspace",
        [](const std::array<int64_t, 5> &size, bool normalize, int dtype) {
          return epa::cuda::spatial_attention_fwd_workspace(spatial_sizes(size, normalize, dtype));
        });
  m.def("spatial_attention_bwd_workspace",
        [](const std::array<int64_t, 5> &size, bool normalize, int dtype) {
          return epa::cuda::spatial_attention_bwd_workspace(spatial_sizes(size, normalize, dtype));
        });
  m.def("spatial_attention_fwd",
        [](const std::array<int64_t, 5> &size, bool normalize, uint32_t threshold, Address seed,
           const std::array<View, 3> &view, Address temperature, int64_t temperature_stride,
           Address q_norm, Address workspace, Address stream, View out) {
          py::gil_scoped_release release;
          epa::cuda::spatial_attention_fwd(spatial(size, normalize, threshold, seed, view,
                                                   temperature, temperature_stride, q_norm,
                                                   workspace, stream),
                                           out);
        });
  m.def("spatial_attention_bwd", [](const std::array<int64_t, 5> &size, bool normalize,
                                    uint32_t threshold, Address seed,
                                    const std::array<View, 3> &view, Address temperature,
                                    int64_t temperature_stride, Address q_norm, Address workspace,
                                    Address stream, View dout, const std::array<View, 3> &dview,
                                    Address dtemperature) {
    py::gil_scoped_release release;
    epa::cuda::spatial_attention_bwd(spatial(size, normalize, threshold, seed, view, temperature,
                                             temperature_stride, q_norm, workspace, stream),
                                     dout, {dview[0], dview[1], dview[2], pointer(dtemperature)});
  });
  m.def("channel_attention_fwd_workspace", [](const std::array<int64_t, 4> &size, int dtype) {
    return epa::cuda::channel_attention_fwd_workspace(channel_sizes(size, dtype));
  });
  m.def("channel_attention_bwd_workspace", [](const std::array<int64_t, 4> &size, int dtype) {
    return epa::cuda::channel_attention_bwd_workspace(channel_sizes(size, dtype));
  });
  m.def("channel_attention_fwd",
        [](const std::array<int64_t, 4> &size, uint32_t threshold, Address seed,
           const std::array<View, 3> &view, Address temperature, int64_t temperature_stride,
           const std::array<Address, 3> &kept, Address workspace, Address stream, View out) {
          py::gil_scoped_release release;
          epa::cuda::channel_attention_fwd(channel(size, threshold, seed, view, temperature,
                                                   temperature_stride, kept, workspace, stream),
                                           out);
        });
  m.def("channel_attention_bwd",
        [](const std::array<int64_t, 4> &size, uint32_t threshold, Address seed,
           const std::array<View, 3> &view, Address temperature, int64_t temperature_stride,
           const std::array<Address, 3> &kept, Address workspace, Address stream, View dout,
           const std::array<View, 3> &dview, Address dtemperature) {
          py::gil_scoped_release release;
          epa::cuda::channel_attention_bwd(channel(size, threshold, seed, view, temperature,
                                                   temperature_stride, kept, workspace, stream),
                                           dout,
                                           {dview[0], dview[1], dview[2], pointer(dtemperature)});
        });
}
