// Channel attention against its reference; check.h says how the program ends.
#include "check_branch.h"

namespace {

using namespace check;

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
  return run_checks(count, arguments,
                    {{"channel",
                      [] {
                        return channel_is_right<__half>({67, 2, 9, 67}, epa::Dtype::float16, 0.01) &
                               channel_is_right<float>({67, 1, 18, 67}, epa::Dtype::float32, 1e-4);
                      }},
                     {"channel_mma", [] {
                        return channel_is_right<__nv_bfloat16>({67, 2, 8, 67}, epa::Dtype::bfloat16,
                                                               0.03) &
                               channel_is_right<float>({67, 1, 8, 67}, epa::Dtype::float32, 1e-5) &
                               channel_is_right<__half>({67, 2, 16, 67}, epa::Dtype::float16, 0.01);
                      }}});
}
