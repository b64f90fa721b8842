// Runs spatial attention on the emulator, in memory that ends where the tensors end, and compares
// it with the definition in double. Exit status 0: right, 1: wrong, 2: refused by the emulator.
// Small grids: ThreadSanitizer counts at most some thousand threads a launch.
#include "cuda_kernels.h"
#include "numbers.h"
#include "../../csrc/philox.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

namespace {

using namespace epa::cuda;

struct Shape {
  int64_t N, H, D, P;
};

constexpr uint32_t THRESHOLD = 13107;
constexpr int64_t SEED = -5;

// One sample's gradients and output, in the order of heads, then of rows.
struct Results {
  std::vector<double> out, q, k, v, temperature;
};

Results definition(Shape s, const std::vector<double> &q, const std::vector<double> &k,
                   const std::vector<double> &v, const std::vector<double> &dout,
                   const std::vector<double> &temperature) {
  const size_t tokens = s.N * s.H * s.D, keys = s.P * s.H * s.D;
  Results r = {std::vector<double>(tokens), std::vector<double>(tokens), std::vector<double>(keys),
               std::vector<double>(keys), std::vector<double>(s.H)};
  const auto at = [&](int64_t row, int64_t h, int64_t d) { return (row * s.H + h) * s.D + d; };
  for (int64_t h = 0; h < s.H; ++h) {
    std::vector<double> norm(s.D), along(s.D), weights(s.P), kept(s.P), dlogits(s.P);
    for (int64_t d = 0; d < s.D; ++d) {
      for (int64_t n = 0; n < s.N; ++n) norm[d] += q[at(n, h, d)] * q[at(n, h, d)];
      norm[d] = std::sqrt(norm[d]);
    }
    for (int64_t n = 0; n < s.N; ++n) {
      double largest = -INFINITY, total = 0, product = 0;
      for (int64_t p = 0; p < s.P; ++p) {
        uint16_t halves[8];
        epa::philox(SEED, h * s.N + n, p / 8, epa::SPATIAL_MAP, halves);
        kept[p] = halves[p % 8] >= THRESHOLD ? epa::dropout_scale(THRESHOLD) : 0;
        weights[p] = 0;
        for (int64_t d = 0; d < s.D; ++d)
          weights[p] += temperature[h] * q[at(n, h, d)] / norm[d] * k[at(p, h, d)];
        largest = std::max(largest, weights[p]);
      }
      for (double &weight : weights) total += weight = std::exp(weight - largest);
      for (int64_t p = 0; p < s.P; ++p) {
        weights[p] /= total;
        dlogits[p] = 0;
        for (int64_t d = 0; d < s.D; ++d) {
          r.out[at(n, h, d)] += weights[p] * kept[p] * v[at(p, h, d)];
          r.v[at(p, h, d)] += weights[p] * kept[p] * dout[at(n, h, d)];
          dlogits[p] += dout[at(n, h, d)] * v[at(p, h, d)] * kept[p];
        }
        product += weights[p] * dlogits[p];
      }
      for (int64_t p = 0; p < s.P; ++p) {
        const double dlogit = weights[p] * (dlogits[p] - product);
        for (int64_t d = 0; d < s.D; ++d) {
          const double q_hat = q[at(n, h, d)] / norm[d];
          r.k[at(p, h, d)] += dlogit * temperature[h] * q_hat;
          r.temperature[h] += dlogit * q_hat * k[at(p, h, d)];
          r.q[at(n, h, d)] += dlogit * temperature[h] / norm[d] * k[at(p, h, d)];
        }
      }
      for (int64_t d = 0; d < s.D; ++d) along[d] += r.q[at(n, h, d)] * q[at(n, h, d)];
    }
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t d = 0; d < s.D; ++d)
        r.q[at(n, h, d)] -= q[at(n, h, d)] * along[d] / (norm[d] * norm[d]);
  }
  return r;
}

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

template <class V>
bool is_close(const char *name, const V &found, const std::vector<double> &exact,
              double tolerance) {
  double error = 0, largest = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double difference = std::abs(widen(found[i]) - exact[i]);
    // A NaN is the largest error.
    if (!(difference <= error)) error = std::isnan(difference) ? INFINITY : difference;
    largest = std::max(largest, std::abs(exact[i]));
  }
  if (error <= tolerance * largest) return true;
  std::printf("%s: error %g of %g\n", name, error, largest);
  return false;
}

template <class T> bool check(Shape s, epa::Dtype dtype, double tolerance) {
  std::mt19937 random(1);
  Tensor<T> q(s, s.N), k(s, s.P), v(s, s.P), dout(s, s.N), out(s, s.N);
  Tensor<T> dq(s, s.N), dk(s, s.P), dv(s, s.P);
  const auto q_values = q.fill(random), k_values = k.fill(random), v_values = v.fill(random);
  const auto gradient = dout.fill(random);
  std::vector<float> temperature, dtemperature(s.H), q_norm(s.H * s.D);
  for (int64_t h = 0; h < s.H; ++h) temperature.push_back(4 + h);
  SpatialAttention a = {};
  a.B = 1, a.N = s.N, a.H = s.H, a.D = s.D, a.P = s.P;
  a.normalize = true, a.threshold = THRESHOLD, a.seed = &SEED;
  a.q = q.view(dtype), a.k_proj = k.view(dtype), a.v_proj = v.view(dtype);
  a.temperature = temperature.data(), a.temperature_stride = 1, a.q_norm = q_norm.data();
  std::vector<char> forward_memory(spatial_attention_fwd_workspace(a), char(0xFF));
  a.workspace = forward_memory.data();
  spatial_attention_fwd(a, out.view(dtype));
  std::vector<char> backward_memory(spatial_attention_bwd_workspace(a), char(0xFF));
  a.workspace = backward_memory.data();
  spatial_attention_bwd(a, dout.view(dtype),
                        {dq.view(dtype), dk.view(dtype), dv.view(dtype), dtemperature.data()});
  const Results exact = definition(s, q_values, k_values, v_values, gradient,
                                   {temperature.begin(), temperature.end()});
  const bool right[] = {is_close("out", out.values, exact.out, tolerance),
                        is_close("q", dq.values, exact.q, tolerance),
                        is_close("k_proj", dk.values, exact.k, tolerance),
                        is_close("v_proj", dv.values, exact.v, tolerance),
                        is_close("temperature", dtemperature, exact.temperature, tolerance)};
  return std::all_of(std::begin(right), std::end(right), [](bool is_right) { return is_right; });
}

} // namespace

int main() {
  try {
    const bool specialised = check<__nv_bfloat16>({67, 2, 8, 33}, epa::Dtype::bfloat16, 0.03);
    const bool generic = check<float>({67, 2, 5, 9}, epa::Dtype::float32, 1e-4);
    return specialised && generic ? 0 : 1;
  } catch (const std::exception &error) {
    std::puts(error.what());
    return 2;
  }
}
