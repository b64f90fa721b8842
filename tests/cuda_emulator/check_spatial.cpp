// Spatial attention against its reference; check.h says how the program ends.
#include "check_branch.h"

namespace {

using namespace check;

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

} // namespace

int main(int count, char **arguments) {
  return run_checks(count, arguments,
                    {{"spatial", [] {
                        return spatial_is_right<__nv_bfloat16>({67, 2, 8, 33}, epa::Dtype::bfloat16,
                                                               0.03) &
                               spatial_is_right<float>({67, 1, 8, 17}, epa::Dtype::float32, 1e-5) &
                               spatial_is_right<float>({67, 2, 5, 9}, epa::Dtype::float32, 1e-4);
                      }}});
}
