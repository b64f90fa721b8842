// Paired attention on a GPU: which kernels run, on which grid, and what lies in the workspace.
// The reference is reference.paired_attention.
#include "host.h"
#include "paired_gather.cuh"
#include "paired_mix_mma.cuh"
#include "paired_output.cuh"
#include "paired_output_mma.cuh"
#include "paired_product.cuh"
#include "paired_product_mma.cuh"
#include "paired_summary.cuh"
#include "paired_summary_mma.cuh"

#include <algorithm>

namespace epa::cuda {
namespace {

// Bytes of shared memory for a tile of out_s; the rest is for the map.
constexpr int64_t TILE_LIMIT = SHARED_LIMIT / 2;
// Bytes that kernels declare beside what they are launched with.
constexpr int64_t STATIC_LIMIT = MATRIX_ROWS * 8;
constexpr int64_t TILE_TOKENS = 64; // of a tile of out_s, at most
// Sums of all chunks take at most so many times the bytes of x, or give a sample so many blocks.
constexpr int64_t SUMS_LIMIT = 4, LEAST_BLOCKS = 128;
static_assert(SUMMARY_SIDE == MAP_COLUMNS, "both kernels of the summary have one grid");
constexpr int64_t MMA_STATIC = (2 * 64 + CHANNEL_OUTPUTS) * 4; // bytes, as STATIC_LIMIT

int64_t blocks_of(int64_t size, int64_t rows) { return (size + rows - 1) / rows; }

// Hands out pieces of the workspace; without memory it measures.
class Workspace {
public:
  explicit Workspace(void *memory) : memory_(static_cast<char *>(memory)) {}

  template <class E> E *take(int64_t count) {
    const int64_t at = size_;
    size_ += blocks_of(count * sizeof(E), 16) * 16;
    return memory_ ? reinterpret_cast<E *>(memory_ + at) : nullptr;
  }
  int64_t size() const { return size_; }

private:
  char *memory_;
  int64_t size_ = 0;
};

template <class E> Tokens<E> tokens(const View &view) {
  return {static_cast<E *>(view.data), view.stride[0], view.stride[1], view.stride[2]};
}

template <class T> class Launcher {
  using A = Accumulate<T>;

public:
  Launcher(const PairedAttention &a, bool is_backward) : a_(a), memory_(a.workspace) {
    const int64_t B = a.B, N = a.N, C = a.C, H = a.H, P = a.P;
    const auto weight = [&](const void *data) { return parameter(const_cast<void *>(data)); };
    p_.N = N, p_.B = B, p_.C = C, p_.H = H, p_.P = P;
    p_.D = C / H, p_.J = a.kind == Kind::split ? 2 : 1;
    p_.is_sum = a.kind == Kind::sum, p_.O = p_.is_sum ? C : C / 2;
    p_.is_official = a.layout == Layout::official, p_.is_direct = a.direct;
    p_.channel_threshold = a.channel_threshold, p_.spatial_threshold = a.spatial_threshold;
    p_.seed = a.seed;
    p_.x = tokens<const T>(a.x);
    p_.projection[0] = projection(a.proj_k_weight);
    p_.projection[1] = projection(a.proj_v_weight);
    p_.projection_bias[0] = weight(a.proj_k_bias);
    p_.projection_bias[1] = weight(p_.J == 2 ? a.proj_v_bias : a.proj_k_bias);
    p_.qkvv_weight = weight(a.qkvv_weight), p_.qkvv_bias = weight(a.qkvv_bias);
    p_.temperature = weight(a.temperature), p_.temperature2 = weight(a.temperature2);
    p_.out_proj_weight = weight(a.out_proj_weight), p_.out_proj_bias = weight(a.out_proj_bias);
    p_.out_proj2_weight = weight(a.out_proj2_weight), p_.out_proj2_bias = weight(a.out_proj2_bias);

    const int D = p_.D, J = p_.J;
    const Chunks chunks =
        chunks_of(C * (C + 2 + H) + J * P * C,
                  blocks_of_64(C) * (blocks_of_64(C) + J * int64_t(blocks_of_64(P))));
    p_.chunks = is_backward || a.direct ? 1 : chunks.count;
    p_.chunk = p_.chunks == 1 ? N : chunks.size;
    p_.mean = a.direct ? take<double>(B * C) : static_cast<double *>(a.mean);
    p_.gram = static_cast<A *>(a.gram);
    p_.projected = a.direct ? take(B * J * P * C) : static_cast<A *>(a.projected);
    p_.chunk_means = p_.mean, p_.chunk_grams = p_.gram, p_.chunk_projected = p_.projected;
    p_.deltas = nullptr;
    if (p_.chunks > 1) {
      p_.chunk_means = take<double>(B * p_.chunks * C);
      p_.chunk_grams = take(B * p_.chunks * C * C);
      p_.chunk_projected = take(B * p_.chunks * J * P * C);
      p_.deltas = take(B * H * p_.chunks * C);
    }
    p_.row_sums = a.qkvv_bias ? take(J * P) : nullptr;
    p_.centred = a.direct ? take(B * H * N * 2 * D) : nullptr;
    p_.q_gram = take(B * C * C), p_.k_gram = take(B * C * C);
    p_.q_mean = take(B * C), p_.k_mean = take(B * C);
    p_.q_norm = take(B * C), p_.k_norm = take(B * C);
    p_.dots = take(B * C * D), p_.attention = take(B * C * D);
    p_.value_matrix = take(B * C * C), p_.value_constant = take(B * C);
    p_.matrix_parts = p_.is_sum ? nullptr : take(B * H * p_.O * C);
    p_.constant_parts = p_.is_sum ? nullptr : take(B * H * p_.O);
    p_.k_proj = take(B * P * C), p_.v_proj = take(B * P * C), p_.scale = take(B * C);
    if (is_backward)
      take_backward();
    else
      choose_tiles();
  }

  int64_t workspace() const { return memory_.size(); }

  void forward(void *result) const {
    T *y = static_cast<T *>(result);
    if (!a_.direct) {
      const int64_t columns = blocks_of(a_.C, SUMMARY_SIDE);
      const int64_t rows = columns + p_.J * blocks_of(a_.P, SUMMARY_SIDE);
      const dim3 grid(p_.chunks, rows * columns, a_.B);
      if (has_tensor_cores<T>(a_.tf32x3))
        summary_mma(grid);
      else
        summary(grid);
      check("summary_fwd");
    }
    mix(nullptr, nullptr);
    if (mma_.span)
      with_head_dim<T>(p_.D, [&](auto d) { output_mma<decltype(d)::value>(y); });
    else
      output(y);
    if (out_s_) product(y);
  }

  void product(T *y) const {
    if (has_mma_projection(a_.C)) {
      if constexpr (sizeof(T) <= 4)
        EPA_LAUNCH((paired_attention_product_fwd_mma_kernel<T>), dim3(projection_jobs(p_.O), a_.B),
                   PAIRED_THREADS, projection_shared(a_.C), a_.stream, p_, token_chunk(), out_s_,
                   y);
      return check("product_fwd_mma");
    }
    EPA_LAUNCH((paired_attention_product_fwd_kernel<T>), dim3(blocks_of(a_.N, TOKEN_ROWS), a_.B),
               PAIRED_THREADS, 0, a_.stream, p_, out_s_, y);
    check("product_fwd");
  }

  void summary_mma(dim3 grid) const {
    if constexpr (sizeof(T) <= 4)
      EPA_LAUNCH((paired_attention_summary_fwd_mma_kernel<T>), grid, PAIRED_THREADS, 0, a_.stream,
                 p_);
  }
  void summary(dim3 grid) const {
    if constexpr (sizeof(T) >= 4)
      EPA_LAUNCH((paired_attention_summary_fwd_kernel<T>), grid, PAIRED_THREADS, 0, a_.stream, p_);
  }

  void output(T *y) const {
    const int64_t tile = tiles_.tokens * tiles_.heads * p_.D;
    const int64_t spatial = (tile + tiles_.map_rows * (p_.D + a_.P)) * sizeof(A);
    const int64_t channel = p_.is_sum ? 0 : tiles_.matrix_rows * a_.C * sizeof(A);
    const int64_t jobs =
        a_.H / tiles_.heads + (p_.is_sum ? 0 : blocks_of(p_.O, tiles_.matrix_rows));
    EPA_LAUNCH((paired_attention_output_fwd_kernel<T>),
               dim3(blocks_of(a_.N, tiles_.chunk), jobs, a_.B), PAIRED_THREADS,
               std::max(spatial, channel), a_.stream, p_, tiles_, y, out_s_);
    check("output_fwd");
  }

  template <int D> void output_mma(T *y) const {
    const int64_t jobs = a_.H + (p_.is_sum ? 0 : blocks_of(p_.O, CHANNEL_OUTPUTS));
    EPA_LAUNCH((paired_attention_output_fwd_mma_kernel<T, D>),
               dim3(blocks_of(a_.N, mma_.chunk), jobs, a_.B), MMA_THREADS,
               std::max(mma_shared(mma_.is_resident), p_.is_sum ? 0 : channel_shared()), a_.stream,
               p_, mma_, y, out_s_);
    check("output_fwd_mma");
  }

  void backward(const void *gradient, const PairedAttentionGradients &gradients) {
    const T *dy = g_.dy = static_cast<const T *>(gradient);
    if (p_.is_sum) g_.dout = const_cast<T *>(dy);
    g_.dx = tokens<T>(gradients.x);
    g_.dprojection[0] = projection(gradients.proj_k_weight);
    g_.dprojection[1] = projection(gradients.proj_v_weight);
    const auto weight = [&](void *data) { return parameter(data); };
    g_.qkvv_weight = weight(gradients.qkvv_weight), g_.qkvv_bias = weight(gradients.qkvv_bias);
    g_.proj_k_bias = weight(gradients.proj_k_bias), g_.proj_v_bias = weight(gradients.proj_v_bias);
    g_.temperature = weight(gradients.temperature);
    g_.temperature2 = weight(gradients.temperature2);
    g_.out_proj_weight = weight(gradients.out_proj_weight);
    g_.out_proj_bias = weight(gradients.out_proj_bias);
    g_.out_proj2_weight = weight(gradients.out_proj2_weight);
    g_.out_proj2_bias = weight(gradients.out_proj2_bias);

    const int64_t B = a_.B, C = a_.C, H = a_.H, P = a_.P, D = p_.D, J = p_.J, O = p_.O;
    const int64_t outputs = blocks_of(O, MATRIX_ROWS);
    mix(dy, p_.is_sum ? nullptr : g_.dout);

    if (g_.is_specialised)
      with_head_dim<T>(p_.D, [&](auto d) { output_bwd_mma<decltype(d)::value>(); });
    else
      output_bwd();

    const int width = std::min<int64_t>(C, SHARED_LIMIT / (O * sizeof(A)) - 1);
    int64_t shared = std::max((1 + width) * O, (PAIRED_WARPS + 1) * D) * sizeof(A);
    int64_t jobs = blocks_of(C, MATRIX_ROWS) + (p_.is_sum ? 0 : outputs);
    if (g_.is_specialised) {
      shared = std::max(shared, TOKEN_PRODUCTS_SHARED<T>);
      jobs = blocks_of_64(C) * (blocks_of_64(C) + (p_.is_sum ? 0 : blocks_of_64(O)));
    }
    jobs *= g_.chunks;
    EPA_LAUNCH((paired_attention_mix_bwd_kernel<T>), dim3(H + jobs, B), PAIRED_THREADS, shared,
               a_.stream, p_, g_, width);
    check("mix_bwd");

    GatherBlocks ends;
    ends.dgram = B * blocks_of(C, MATRIX_ROWS);
    ends.dprojected = ends.dgram + B * J * blocks_of(P, PROJECTED_ROWS);
    ends.matrix = ends.dprojected + (p_.is_sum ? 0 : B * outputs);
    ends.qkvv_weight = ends.matrix + 4 * H * blocks_of(D, MATRIX_ROWS);
    ends.out_proj2_weight = ends.qkvv_weight + (p_.is_sum ? 0 : outputs);
    ends.out_proj_weight = ends.out_proj2_weight + (p_.is_sum ? 0 : outputs);
    EPA_LAUNCH((paired_attention_gather_bwd_kernel<T>), ends.out_proj_weight + 1, PAIRED_THREADS, 0,
               a_.stream, p_, g_, static_cast<int>(B), ends);
    check("gather_bwd");

    if (g_.is_specialised) return summary_bwd_mma();
    EPA_LAUNCH((paired_attention_summary_bwd_kernel<T>), dim3(blocks_of(a_.N, TOKEN_ROWS), B + J),
               PAIRED_THREADS, 0, a_.stream, p_, g_, static_cast<int>(B));
    check("summary_bwd");
  }

private:
  void output_bwd() const {
    const int64_t row = (p_.D + 2 * a_.P) * sizeof(A), jobs = blocks_of(p_.O, MATRIX_ROWS);
    const int rows = std::min<int64_t>(TOKEN_ROWS, SHARED_LIMIT / row);
    EPA_LAUNCH((paired_attention_output_bwd_kernel<T>), dim3(g_.chunks, a_.H + jobs, a_.B),
               PAIRED_THREADS, rows * row, a_.stream, p_, g_, rows);
    check("output_bwd");
  }

  template <int D> void output_bwd_mma() const {
    const int64_t jobs = int64_t(blocks_of_64(p_.O)) * blocks_of_64(a_.C);
    const int64_t weights = a_.C / CHANNEL_BLOCK * D * CHANNEL_STRIDE;
    const int64_t rows = 4 * TILE_ROWS * ROW_STRIDE<D>;
    const int64_t resident = (rows + TILE_ROWS * MAP_STRIDE + weights) * sizeof(T);
    const int64_t streamed =
        (rows + std::max(TILE_ROWS * MAP_STRIDE, (TILE_ROWS + D) * CHANNEL_STRIDE)) * sizeof(T);
    const bool is_resident = resident <= SHARED_LIMIT - MMA_STATIC;
    EPA_LAUNCH((paired_attention_output_bwd_mma_kernel<T, D>), dim3(g_.chunks, a_.H + jobs, a_.B),
               MMA_THREADS, std::max(is_resident ? resident : streamed, TOKEN_PRODUCTS_SHARED<T>),
               a_.stream, p_, g_, is_resident);
    check("output_bwd_mma");
  }

  void summary_bwd_mma() const {
    if constexpr (sizeof(T) <= 4) {
      const int64_t blocks = a_.C / CHANNEL_BLOCK;
      const DxSlices slices(a_.C, p_.O, p_.J);
      const auto bytes = [&](int64_t of_slices) { return of_slices * int64_t(sizeof(T)); };
      const int64_t dx = a_.C * 4 + bytes(PROJECTION_TILE + ROWS_TILE),
                    dprojection = bytes(ROWS_TILE);
      const int64_t matrices = dx + bytes(slices.offset(slices.count));
      const int64_t samples = dprojection + bytes(2 * SLICE * a_.B * blocks);
      GradientTiles tiles;
      tiles.samples = a_.B;
      tiles.has_all_matrices = matrices <= SHARED_LIMIT - MMA_STATIC;
      tiles.has_all_samples = samples <= SHARED_LIMIT - MMA_STATIC;
      tiles.chunk = token_chunk();
      const int64_t streamed = bytes(2 * SLICE);
      EPA_LAUNCH((paired_attention_summary_bwd_mma_kernel<T>),
                 blocks_of(a_.N, tiles.chunk) * (a_.B * blocks + p_.J), MMA_THREADS,
                 std::max(tiles.has_all_matrices ? matrices : dx + streamed,
                          tiles.has_all_samples ? samples : dprojection + streamed),
                 a_.stream, p_, g_, tiles);
      check("summary_bwd_mma");
    }
  }

  // For sums of `numbers` numbers a chunk by `blocks` blocks.
  Chunks chunks_of(int64_t numbers, int64_t blocks) const {
    const int64_t x = a_.N * a_.C * int64_t(sizeof(T)), sums = numbers * int64_t(sizeof(A));
    const int64_t most = std::max(SUMS_LIMIT * x / sums, blocks_of(LEAST_BLOCKS, blocks));
    return sum_chunks(a_.N, std::min(most, SUM_CHUNKS));
  }

  Parameter<T> parameter(void *data) const { return {data, a_.weight_dtype != a_.x.dtype}; }
  Projection<T> projection(const View &view) const {
    return {parameter(view.data), view.stride[0], view.stride[1]};
  }
  template <class E = A> E *take(int64_t count) { return memory_.template take<E>(count); }

  void check(const char *kernel) const {
    check_launch("paired_attention", kernel, "B N C H P", {a_.B, a_.N, a_.C, a_.H, a_.P});
  }

  bool is_specialised() const {
    return has_tensor_cores<T>(a_.tf32x3) && has_mma<T>(p_.D) && a_.P <= MAP_COLUMNS &&
           a_.C % CHANNEL_BLOCK == 0 && channel_shared() <= SHARED_LIMIT - MMA_STATIC;
  }

  // Bytes of shared memory of the specialised output pass, and of its channel branch.
  int64_t mma_shared(bool is_resident) const {
    const int64_t row = p_.D == 8 ? 8 : p_.D + 8;
    const int64_t weights = (is_resident ? a_.C / CHANNEL_BLOCK : 1) * p_.D * CHANNEL_STRIDE;
    const int64_t outs = p_.D * (mma_.span + 8);
    return (TILE_ROWS * CHANNEL_STRIDE + 2 * MAP_COLUMNS * row + outs + weights) * sizeof(T);
  }
  int64_t channel_shared() const {
    const int64_t matrix = a_.C / CHANNEL_BLOCK * CHANNEL_OUTPUTS * CHANNEL_STRIDE;
    return (TILE_ROWS * CHANNEL_STRIDE + matrix) * sizeof(T);
  }

  // The output projection on tensor cores, whose sums are over `depth` channels.
  static int64_t projection_shared(int64_t depth) {
    return (TILE_ROWS * MAP_STRIDE + MAP_COLUMNS * projection_stride(depth)) * sizeof(T);
  }
  bool has_mma_projection(int64_t depth) const {
    return has_tensor_cores<T>(a_.tf32x3) && projection_shared(depth) <= SHARED_LIMIT;
  }
  // Few tokens need their blocks more than a block needs its matrices for long.
  int64_t token_chunk() const { return a_.N < 16 * OUTPUT_CHUNK ? TILE_ROWS : 2 * TILE_ROWS; }
  int64_t projection_jobs(int64_t columns) const {
    return blocks_of(a_.N, token_chunk()) * blocks_of_64(columns);
  }

  // Whether the output pass is one of the specialised kernels.
  bool choose_mma_tiles() {
    const int64_t C = a_.C, tile = TILE_ROWS;
    mma_.has_rows = a_.N % C == 0 && (C % tile == 0 || tile % C == 0);
    mma_.span = std::max(C, tile);
    if (!mma_.has_rows || mma_shared(false) > SHARED_LIMIT - MMA_STATIC)
      mma_.has_rows = false, mma_.span = p_.is_sum ? 0 : tile;
    if (!mma_.span) return false;
    mma_.is_resident = mma_shared(true) <= SHARED_LIMIT - MMA_STATIC;
    // Whole spans. Few tokens need their blocks more than a block needs its weights for long.
    const bool is_many = a_.N >= 16 * OUTPUT_CHUNK;
    mma_.chunk = mma_.span * (is_many ? std::max<int64_t>(1, OUTPUT_CHUNK / mma_.span) : 1);
    out_s_ = mma_.has_rows ? nullptr : take<T>(a_.B * a_.N * C);
    return true;
  }

  void choose_tiles() {
    if (is_specialised() && p_.is_official && choose_mma_tiles()) return;
    const int64_t N = a_.N, C = a_.C, D = p_.D, size = sizeof(A);
    const bool has_rows = p_.is_official && N % C == 0 && C * D * size <= TILE_LIMIT;
    tiles_.finish = has_rows ? Finish::rows : p_.is_official ? Finish::flat : Finish::tokens;
    tiles_.heads = tiles_.finish == Finish::tokens && !p_.is_sum ? a_.H : 1;
    const int64_t row = tiles_.heads * D * size;
    tiles_.tokens = has_rows ? C : std::min(TILE_TOKENS, TILE_LIMIT / row);
    const int64_t rest = SHARED_LIMIT - STATIC_LIMIT - tiles_.tokens * row;
    tiles_.map_rows = std::min<int64_t>({TOKEN_ROWS, tiles_.tokens, rest / ((D + a_.P) * size)});
    tiles_.matrix_rows = std::min<int64_t>(MATRIX_ROWS, (SHARED_LIMIT - STATIC_LIMIT) / (C * size));
    tiles_.chunk = tiles_.tokens * std::max<int64_t>(1, OUTPUT_CHUNK / tiles_.tokens);
    out_s_ = tiles_.finish == Finish::flat && !p_.is_sum ? take<T>(a_.B * N * C) : nullptr;
  }

  void take_backward() {
    const int64_t B = a_.B, N = a_.N, C = a_.C, H = a_.H, P = a_.P, D = p_.D, J = p_.J, O = p_.O;
    const int64_t head = head_size(P, D);
    const int64_t rows = C + (p_.is_sum ? O : 2 * O); // of the sums that have C columns
    const Chunks chunks =
        chunks_of(H * head + rows * C, H + int64_t(blocks_of_64(O)) * blocks_of_64(C));
    g_.chunks = chunks.count, g_.chunk = chunks.size;
    g_.is_specialised = is_specialised();
    g_.dq = take<T>(B * N * C);
    g_.dout = p_.is_sum ? nullptr : take<T>(B * N * C);
    g_.out_s = p_.is_sum ? nullptr : take<T>(B * N * C);
    g_.head_sums = take(B * H * chunks.count * head), g_.head_totals = take(B * H * head);
    g_.matrix_sums = take(B * chunks.count * O * C), g_.dmatrix = take(B * O * C);
    g_.constant_sums = take(B * chunks.count * O), g_.dconstant = take(B * O);
    g_.q_weight_sums = take(B * chunks.count * C * C);
    g_.out_proj_sums = p_.is_sum ? nullptr : take(B * chunks.count * O * C);
    g_.out_proj_bias_sums = p_.is_sum ? nullptr : take(B * chunks.count * O);
    g_.dvalue_matrix = take(B * C * C), g_.dvalue_constant = take(B * C);
    g_.ddots = take(B * C * D);
    g_.dq_norm = take(B * C), g_.dk_norm = take(B * C);
    g_.dmeans = take(B * 2 * C), g_.dtotals = take(B * 2 * C);
    g_.factors = take(B * 2 * C * C);
    g_.dk_proj = take(B * P * C), g_.dv_proj = take(B * P * C);
    g_.dprojection_bias = take(B * H * 2 * P), g_.drow_sums = take(B * H * 2 * P);
    g_.dqkvv_bias = take(B * 4 * C);
    g_.dtemperature = take(B * H), g_.dtemperature2 = take(B * H);
    g_.dgram = take(B * C * C), g_.dtoken = take(B * C);
    g_.dprojected = take(B * J * P * C), g_.drows = take(J * P);
    g_.matrix = p_.is_sum ? p_.value_matrix : take(B * O * C);
  }

  void mix(const T *dy, T *dout) const {
    if (p_.row_sums) {
      EPA_LAUNCH((paired_attention_row_sums_fwd_kernel<T>), dim3(a_.P, p_.J), PAIRED_THREADS, 0,
                 a_.stream, p_);
      check("row_sums_fwd");
    }
    const int64_t mean = a_.C * sizeof(double), column = a_.C * sizeof(A);
    const int width = std::min(a_.C, (SHARED_LIMIT - mean) / column);
    int64_t jobs = a_.H + p_.J * blocks_of(a_.P, PROJECTED_ROWS), chunk = 0;
    int64_t shared = mean + (a_.direct ? 0 : width * column);
    if (dout && has_mma_projection(p_.O)) {
      chunk = token_chunk(), jobs += projection_jobs(a_.C);
      shared = std::max(shared, projection_shared(p_.O));
    } else if (dout) {
      jobs += blocks_of(a_.N, TOKEN_ROWS);
    }
    EPA_LAUNCH((paired_attention_mix_fwd_kernel<T>), dim3(jobs, a_.B), PAIRED_THREADS, shared,
               a_.stream, p_, width, dy, dout, chunk);
    check("mix_fwd");
  }

  const PairedAttention &a_;
  Workspace memory_;
  Paired<T> p_ = {};
  PairedBackward<T> g_ = {};
  OutputTiles tiles_ = {};
  MmaTiles mma_ = {}; // span 0 where the generic kernel runs
  T *out_s_ = nullptr;
};

template <class F> auto with_launcher(const PairedAttention &a, bool is_backward, F f) {
  return with_type(a.x.dtype, [&](auto type) {
    return f(Launcher<typename decltype(type)::type>(a, is_backward));
  });
}

} // namespace

int64_t paired_attention_fwd_workspace(const PairedAttention &a) {
  return with_launcher(a, false, [](const auto &launcher) { return launcher.workspace(); });
}

int64_t paired_attention_bwd_workspace(const PairedAttention &a) {
  return with_launcher(a, true, [](const auto &launcher) { return launcher.workspace(); });
}

void paired_attention_fwd(const PairedAttention &a, void *y) {
  with_launcher(a, false, [&](auto launcher) { launcher.forward(y); });
}

void paired_attention_bwd(const PairedAttention &a, const void *dy,
                          const PairedAttentionGradients &gradients) {
  with_launcher(a, true, [&](auto launcher) { launcher.backward(dy, gradients); });
}

} // namespace epa::cuda
