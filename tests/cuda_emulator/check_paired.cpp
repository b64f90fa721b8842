// Paired attention, kind shared in the official layout, with biases and dropout: in double its
// output against the reference, and its gradients along random directions against differences of
// it; in other dtypes both against double.
#include "check.h"

namespace {

using namespace check;

struct PairedShape {
  int64_t N, C, H, P;
};

// In the order of the op: x, qkvv_weight, qkvv_bias, projection and its bias, both temperatures,
// weight and bias of both output projections.
constexpr int PAIRED_INPUTS = 11;
using PairedTensors = std::vector<std::vector<double>>;

std::vector<double> paired_reference(PairedShape s, const PairedTensors &in) {
  const int64_t N = s.N, C = s.C, D = s.C / s.H, P = s.P, O = s.C / 2;
  std::vector<double> flat(N * C), channel(N * C), y(N * C);
  for (int64_t h = 0; h < s.H; ++h) {
    std::vector<double> part[4], norms[2], projected[2];
    for (int i = 0; i < 4; ++i) {
      part[i].assign(N * D, 0);
      for (int64_t n = 0; n < N; ++n)
        for (int64_t d = 0; d < D; ++d) {
          const int64_t row = i * C + h * D + d;
          double &value = part[i][n * D + d] = in[2][row];
          for (int64_t c = 0; c < C; ++c) value += in[0][n * C + c] * in[1][row * C + c];
        }
    }
    for (int i = 0; i < 2; ++i) {
      norms[i].assign(D, 0), projected[i].assign(P * D, 0);
      for (int64_t d = 0; d < D; ++d) {
        for (int64_t n = 0; n < N; ++n) norms[i][d] += std::pow(part[i][n * D + d], 2);
        norms[i][d] = std::sqrt(norms[i][d]);
        for (int64_t p = 0; p < P; ++p) {
          double &value = projected[i][p * D + d] = in[4][p];
          for (int64_t n = 0; n < N; ++n) value += in[3][p * N + n] * part[2 * i + 1][n * D + d];
        }
      }
    }
    // softmax with dropout of a row of logits
    const auto softmax = [](std::vector<double> &row, int64_t number, uint32_t map) {
      double largest = -INFINITY, total = 0;
      for (double logit : row) largest = std::max(largest, logit);
      for (double &weight : row) total += weight = std::exp(weight - largest);
      for (size_t i = 0; i < row.size(); ++i) row[i] *= dropout_multiplier(number, i, map) / total;
    };
    for (int64_t i = 0; i < D; ++i) {
      std::vector<double> row(D);
      for (int64_t j = 0; j < D; ++j) {
        for (int64_t n = 0; n < N; ++n) row[j] += part[0][n * D + i] * part[1][n * D + j];
        row[j] *= in[5][h] / (norms[0][i] * norms[1][j]);
      }
      softmax(row, h * D + i, epa::CHANNEL_MAP);
      for (int64_t n = 0; n < N; ++n)
        for (int64_t j = 0; j < D; ++j) channel[n * C + h * D + i] += row[j] * part[2][n * D + j];
    }
    for (int64_t n = 0; n < N; ++n) {
      std::vector<double> row(P);
      for (int64_t p = 0; p < P; ++p)
        for (int64_t d = 0; d < D; ++d)
          row[p] += in[6][h] * part[0][n * D + d] / norms[0][d] * projected[0][p * D + d];
      softmax(row, h * N + n, epa::SPATIAL_MAP);
      for (int64_t d = 0; d < D; ++d)
        for (int64_t p = 0; p < P; ++p)
          flat[(d * s.H + h) * N + n] += row[p] * projected[1][p * D + d];
    }
  }
  for (int64_t n = 0; n < N; ++n)
    for (int64_t o = 0; o < C; ++o) {
      const std::vector<double> &from = o < O ? flat : channel;
      const std::vector<double> &weight = o < O ? in[7] : in[9], &bias = o < O ? in[8] : in[10];
      y[n * C + o] = bias[o % O];
      for (int64_t c = 0; c < C; ++c) y[n * C + o] += from[n * C + c] * weight[o % O * C + c];
    }
  return y;
}

// Output and gradients of the kernels, for x in T and parameters in what sums are taken in.
template <class T>
PairedTensors run_paired(PairedShape s, epa::Dtype dtype, const PairedTensors &in,
                         const std::vector<double> &dy, std::vector<char> &bits) {
  using A = Accumulate<T>;
  const int64_t N = s.N, C = s.C;
  const auto cast = [](const std::vector<double> &from) {
    std::vector<T> result;
    for (double value : from) result.push_back(narrow<T>(A(value)));
    return result;
  };
  std::vector<T> x = cast(in[0]), gradient = cast(dy), y(N * C), dx(N * C);
  std::vector<std::vector<A>> parameters, gradients;
  for (int i = 0; i < PAIRED_INPUTS; ++i) {
    parameters.emplace_back(in[i].begin(), in[i].end());
    gradients.emplace_back(in[i].size());
  }
  const epa::Dtype wide = sizeof(A) == 8 ? epa::Dtype::float64 : epa::Dtype::float32;
  const auto at = [&](int i) { return parameters[i].data(); };
  const auto to = [&](int i) { return gradients[i].data(); };
  PairedAttention a = {};
  a.B = 1, a.N = N, a.C = C, a.H = s.H, a.P = s.P;
  a.kind = epa::Kind::shared, a.layout = epa::Layout::official, a.direct = N < 2 * C;
  a.channel_threshold = a.spatial_threshold = THRESHOLD, a.seed = &SEED, a.weight_dtype = wide;
  a.tf32x3 = true;
  a.x = {x.data(), dtype, {N * C, C, 1}};
  a.proj_k_weight = {at(3), wide, {N, 1}};
  a.qkvv_weight = at(1), a.qkvv_bias = at(2), a.proj_k_bias = at(4);
  a.temperature = at(5), a.temperature2 = at(6);
  a.out_proj_weight = at(7), a.out_proj_bias = at(8);
  a.out_proj2_weight = at(9), a.out_proj2_bias = at(10);
  std::vector<double> mean(a.direct ? 0 : C);
  std::vector<A> gram(a.direct ? 0 : C * C), projected(a.direct ? 0 : s.P * C);
  a.mean = mean.data(), a.gram = gram.data(), a.projected = projected.data();
  std::vector<char> forward_memory(paired_attention_fwd_workspace(a), char(0xFF));
  a.workspace = forward_memory.data();
  paired_attention_fwd(a, y.data());
  std::vector<char> backward_memory(paired_attention_bwd_workspace(a), char(0xFF));
  a.workspace = backward_memory.data();
  epa::PairedAttentionGradients results = {};
  results.x = {dx.data(), dtype, {N * C, C, 1}};
  results.proj_k_weight = {to(3), wide, {N, 1}};
  results.qkvv_weight = to(1), results.qkvv_bias = to(2), results.proj_k_bias = to(4);
  results.temperature = to(5), results.temperature2 = to(6);
  results.out_proj_weight = to(7), results.out_proj_bias = to(8);
  results.out_proj2_weight = to(9), results.out_proj2_bias = to(10);
  paired_attention_bwd(a, gradient.data(), results);

  PairedTensors found(1 + PAIRED_INPUTS);
  append(bits, y), append(bits, dx);
  for (T value : y) found[0].push_back(widen(value));
  for (T value : dx) found[1].push_back(widen(value));
  for (int i = 1; i < PAIRED_INPUTS; ++i) {
    append(bits, gradients[i]);
    found[1 + i].assign(gradients[i].begin(), gradients[i].end());
  }
  return found;
}

template <class T> bool paired_is_right(PairedShape s, epa::Dtype dtype, double tolerance) {
  const int64_t N = s.N, C = s.C, O = s.C / 2;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  // Numbers of T, so that no dtype rounds them.
  const auto numbers = [&](int64_t count, float scale) {
    std::vector<double> result(count);
    for (double &value : result) value = widen(narrow<T>(scale * normal(random)));
    return result;
  };
  const float weight = 1 / std::sqrt(float(C));
  PairedTensors in = {numbers(N * C, 1), numbers(4 * C * C, weight),
                      numbers(4 * C, 1), numbers(s.P * N, 0.1f),
                      numbers(s.P, 1),   numbers(s.H, 1),
                      numbers(s.H, 1),   numbers(O * C, weight),
                      numbers(O, 1),     numbers(O * C, weight),
                      numbers(O, 1)};
  for (double &temperature : in[6]) temperature += 4;
  const std::vector<double> dy = numbers(N * C, 1);
  std::vector<char> bits[2];
  PairedTensors found;
  for (int order = 0; order < ORDERS; ++order) {
    emulator::set_seed(order);
    found = run_paired<T>(s, dtype, in, dy, bits[order]);
  }
  bool right = bits[0] == bits[ORDERS - 1];
  if (!right) std::puts("paired: bits depend on the order");
  right = is_close("y", found[0], paired_reference(s, in), tolerance) && right;
  if (sizeof(T) < 8) {
    if (ORDERS == 1) return right;
    std::vector<char> ignored;
    const PairedTensors exact = run_paired<double>(s, epa::Dtype::float64, in, dy, ignored);
    for (int i = 1; i <= PAIRED_INPUTS; ++i)
      right = is_close("gradient", found[i], exact[i], tolerance) && right;
    return right;
  }
  for (int i = 0; i < PAIRED_INPUTS; ++i) {
    constexpr double STEP = 1e-5;
    std::vector<double> difference(1), along(1);
    const std::vector<double> before = in[i], direction = numbers(before.size(), 1);
    for (int sign = -1; sign <= 1; sign += 2) {
      for (size_t k = 0; k < before.size(); ++k) in[i][k] = before[k] + sign * STEP * direction[k];
      const std::vector<double> y = paired_reference(s, in);
      for (size_t k = 0; k < y.size(); ++k) difference[0] += sign * y[k] * dy[k] / (2 * STEP);
    }
    in[i] = before;
    for (size_t k = 0; k < before.size(); ++k) along[0] += found[1 + i][k] * direction[k];
    right = is_close("gradient along a direction", along, difference, 1e-6) && right;
  }
  return right;
}

} // namespace

int main(int count, char **arguments) {
  return run_checks(
      count, arguments,
      {{"paired",
        [] {
          return paired_is_right<double>({67, 6, 2, 9}, epa::Dtype::float64, 1e-11) &
                 paired_is_right<float>({9, 6, 1, 5}, epa::Dtype::float32, 1e-4);
        }},
       {"paired_mma",
        [] { return paired_is_right<__nv_bfloat16>({96, 32, 2, 17}, epa::Dtype::bfloat16, 0.03); }},
       {"paired_mma_tf32",
        [] { return paired_is_right<float>({70, 32, 4, 17}, epa::Dtype::float32, 1e-5); }},
       {"paired_mma_wide", [] {
          return paired_is_right<__half>({35, WIDE, WIDE / 32, 9}, epa::Dtype::float16, 0.01);
        }}});
}
