// Runs the ops that are named, or all, on the emulator, in memory that ends where the tensors end;
// compares them with their references in double, and their bits between two orders of blocks and
// warps. Exit status 0: right, 1: wrong, 2: refused by the emulator. Small grids: ThreadSanitizer
// counts at most some thousand threads a launch.
#include "check_paired.h"

#include <exception>
#include <functional>
#include <map>
#include <string>

namespace {

using namespace check;

struct Shape {
  int64_t N, H, D, P;
};

// One sample's gradients and output, in the order of heads, then of rows.
struct Results {
  std::vector<double> out, q, k, v, temperature;
};

Results spatial_reference(Shape s, const std::vector<double> &q, const std::vector<double> &k,
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
        kept[p] = dropout_multiplier(h * s.N + n, p, epa::SPATIAL_MAP);
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

Results channel_reference(Shape s, const std::vector<double> &q, const std::vector<double> &k,
                           const std::vector<double> &v, const std::vector<double> &dout,
                           const std::vector<double> &temperature) {
  const size_t size = s.N * s.H * s.D;
  Results r = {std::vector<double>(size), std::vector<double>(size), std::vector<double>(size),
               std::vector<double>(size), std::vector<double>(s.H)};
  const auto at = [&](int64_t n, int64_t h, int64_t d) { return (n * s.H + h) * s.D + d; };
  for (int64_t h = 0; h < s.H; ++h) {
    // sum_n left[n, i] right[n, j]
    const auto dot = [&](const auto &left, int64_t i, const auto &right, int64_t j) {
      double sum = 0;
      for (int64_t n = 0; n < s.N; ++n) sum += left[at(n, h, i)] * right[at(n, h, j)];
      return sum;
    };
    for (int64_t i = 0; i < s.D; ++i) {
      std::vector<double> cosine(s.D), norms(s.D), weights(s.D), kept(s.D), dweights(s.D);
      double total = 0, along = 0;
      for (int64_t j = 0; j < s.D; ++j) {
        norms[j] = std::sqrt(dot(q, i, q, i) * dot(k, j, k, j));
        cosine[j] = dot(q, i, k, j) / norms[j];
        total += weights[j] = std::exp(temperature[h] * cosine[j]);
      }
      for (int64_t j = 0; j < s.D; ++j) {
        kept[j] = dropout_multiplier(h * s.D + i, j, epa::CHANNEL_MAP);
        weights[j] /= total;
        dweights[j] = dot(dout, i, v, j) * kept[j];
        along += weights[j] * dweights[j];
      }
      for (int64_t j = 0; j < s.D; ++j) {
        const double dlogit = weights[j] * (dweights[j] - along);
        const double dcosine = dlogit * temperature[h];
        const double q_square = dot(q, i, q, i), k_square = dot(k, j, k, j);
        r.temperature[h] += dlogit * cosine[j];
        for (int64_t n = 0; n < s.N; ++n) {
          const double q_value = q[at(n, h, i)], k_value = k[at(n, h, j)];
          r.out[at(n, h, i)] += weights[j] * kept[j] * v[at(n, h, j)];
          r.v[at(n, h, j)] += weights[j] * kept[j] * dout[at(n, h, i)];
          r.q[at(n, h, i)] += dcosine * (k_value / norms[j] - cosine[j] * q_value / q_square);
          r.k[at(n, h, j)] += dcosine * (q_value / norms[j] - cosine[j] * k_value / k_square);
        }
      }
    }
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
  template <class Run>
  bool is_right(Run run, decltype(channel_reference) *reference, double tolerance) {
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

template <class T> bool spatial_is_right(Shape s, epa::Dtype dtype, double tolerance) {
  Call<T> call(s, dtype);
  const auto run = [&] {
    auto a = call.template arguments<SpatialAttention>();
    std::vector<float> q_norm(s.H * s.D);
    a.P = s.P, a.normalize = true, a.tf32x3 = true;
    a.k_proj = call.k.view(dtype), a.v_proj = call.v.view(dtype), a.q_norm = q_norm.data();
    std::vector<char> forward_memory(spatial_attention_fwd_workspace(a), char(0xFF));
    a.workspace = forward_memory.data();
    spatial_attention_fwd(a, call.out.view(dtype));
    std::vector<char> backward_memory(spatial_attention_bwd_workspace(a), char(0xFF));
    a.workspace = backward_memory.data();
    spatial_attention_bwd(
        a, call.dout.view(dtype),
        {call.dq.view(dtype), call.dk.view(dtype), call.dv.view(dtype), call.dtemperature.data()});
  };
  return call.is_right(run, spatial_reference, tolerance);
}

template <class T> bool channel_is_right(Shape s, epa::Dtype dtype, double tolerance) {
  Call<T> call(s, dtype);
  const auto run = [&] {
    auto a = call.template arguments<ChannelAttention>();
    std::vector<float> gram(s.H * s.D * s.D), q_norm(s.H * s.D), k_norm(s.H * s.D);
    a.k = call.k.view(dtype), a.v = call.v.view(dtype), a.tf32x3 = true;
    a.gram = gram.data(), a.q_norm = q_norm.data(), a.k_norm = k_norm.data();
    std::vector<char> forward_memory(channel_attention_fwd_workspace(a), char(0xFF));
    a.workspace = forward_memory.data();
    channel_attention_fwd(a, call.out.view(dtype));
    std::vector<char> backward_memory(channel_attention_bwd_workspace(a), char(0xFF));
    a.workspace = backward_memory.data();
    channel_attention_bwd(
        a, call.dout.view(dtype),
        {call.dq.view(dtype), call.dk.view(dtype), call.dv.view(dtype), call.dtemperature.data()});
  };
  return call.is_right(run, channel_reference, tolerance);
}

} // namespace

int main(int count, char **arguments) {
  const std::map<std::string, std::function<bool()>> ops = {
      {"spatial",
       [] {
         return spatial_is_right<__nv_bfloat16>({67, 2, 8, 33}, epa::Dtype::bfloat16, 0.03) &
                spatial_is_right<float>({67, 1, 8, 17}, epa::Dtype::float32, 1e-5) &
                spatial_is_right<float>({67, 2, 5, 9}, epa::Dtype::float32, 1e-4);
       }},
      {"channel",
       [] {
         return channel_is_right<__half>({67, 2, 9, 67}, epa::Dtype::float16, 0.01) &
                channel_is_right<float>({67, 1, 18, 67}, epa::Dtype::float32, 1e-4);
       }},
      {"channel_mma",
       [] {
         return channel_is_right<__nv_bfloat16>({67, 2, 8, 67}, epa::Dtype::bfloat16, 0.03) &
                channel_is_right<float>({67, 1, 8, 67}, epa::Dtype::float32, 1e-5) &
                channel_is_right<__half>({67, 2, 16, 67}, epa::Dtype::float16, 0.01);
       }},
      {"paired",
       [] {
         return paired_is_right<double>({67, 6, 2, 9}, epa::Dtype::float64, 1e-11) &
                paired_is_right<float>({9, 6, 1, 5}, epa::Dtype::float32, 1e-4);
       }},
      {"paired_mma",
       [] { return paired_is_right<__nv_bfloat16>({96, 32, 2, 17}, epa::Dtype::bfloat16, 0.03); }},
      {"paired_mma_tf32",
       [] { return paired_is_right<float>({70, 32, 4, 17}, epa::Dtype::float32, 1e-5); }},
      {"paired_mma_wide",
       [] {
         return paired_is_right<__half>({35, WIDE, WIDE / 32, 9}, epa::Dtype::float16, 0.01);
       }},
  };
  try {
    bool right = true;
    for (const auto &[name, is_right] : ops)
      if (count == 1 || std::find(arguments + 1, arguments + count, name) != arguments + count)
        right = is_right() && right;
    return right ? 0 : 1;
  } catch (const std::exception &error) {
    std::puts(error.what());
    return 2;
  }
}
