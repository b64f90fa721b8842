// What the checks of spatial and of channel attention share.
#pragma once
#include "check.h"

namespace check {

struct Shape {
  int64_t N, H, D, P;
};

// One sample's gradients and output, in the order of heads, then of rows.
struct Results {
  std::vector<double> out, q, k, v, temperature;
};

template <class T> struct Tensor {
  Shape shape;
  std::vector<T> values;

  Tensor(Shape shape, int64_t rows) : shape(shape), values(rows * shape.H * shape.D) {}

  epa::View view(epa::Dtype dtype) {
    const int64_t row = shape.H * shape.D;
    return {values.data(), dtype, {int64_t(values.size()), row, shape.D, 1}};
  }
  std::vector<double> fill(std::mt19937 &random) {
    std::normal_distribution<float> normal;
    std::vector<double> result;
    for (T &value : values) {
      value = narrow<T>(normal(random));
      result.push_back(widen(value));
    }
    return result;
  }
};

// What both ops take and give; P = N for channel attention.
template <class T> struct Call {
  Shape s;
  epa::Dtype dtype;
  std::mt19937 random{1};
  Tensor<T> q, k, v, dout, out, dq, dk, dv;
  std::vector<double> q_values, k_values, v_values, gradient;
  std::vector<float> temperature, dtemperature;

  Call(Shape s, epa::Dtype dtype)
      : s(s), dtype(dtype), q(s, s.N), k(s, s.P), v(s, s.P), dout(s, s.N), out(s, s.N), dq(s, s.N),
        dk(s, s.P), dv(s, s.P), q_values(q.fill(random)), k_values(k.fill(random)),
        v_values(v.fill(random)), gradient(dout.fill(random)), dtemperature(s.H) {
    for (int64_t h = 0; h < s.H; ++h) temperature.push_back(4 + h);
  }

  // The arguments that the two ops share.
  template <class Arguments> Arguments arguments() {
    Arguments a = {};
    a.B = 1, a.N = s.N, a.H = s.H, a.D = s.D;
    a.threshold = THRESHOLD, a.seed = &SEED, a.q = q.view(dtype);
    a.temperature = temperature.data(), a.temperature_stride = 1;
    return a;
  }

  // `run` once for each of two orders of blocks and warps, then its results against exact ones.
  template <class Run, class Reference>
  bool is_right(Run run, Reference reference, double tolerance) {
    std::vector<char> bits[2];
    for (int order = 0; order < ORDERS; ++order) {
      emulator::set_seed(order);
      run();
      append(bits[order], out.values);
      for (const Tensor<T> *result : {&dq, &dk, &dv}) append(bits[order], result->values);
      append(bits[order], dtemperature);
    }
    const Results exact = reference(s, q_values, k_values, v_values, gradient,
                                    {temperature.begin(), temperature.end()});
    const bool right[] = {
        is_close("out", out.values, exact.out, tolerance),
        is_close("q", dq.values, exact.q, tolerance),
        is_close("k", dk.values, exact.k, tolerance),
        is_close("v", dv.values, exact.v, tolerance),
        is_close("temperature", dtemperature, exact.temperature, tolerance),
        bits[0] == bits[ORDERS - 1],
    };
    return std::all_of(std::begin(right), std::end(right), [](bool is_right) { return is_right; });
  }
};

} // namespace check
