// y += U S_user V^T x for a batch of tokens of many users, in one pass over tiles of up to 8 tokens. CPU only.
// Vectors are GCC's own, so the compiler picks the instructions; sums are float32 in every type of storage.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t LANES = 16, TILE = 8, GRAIN = 1;
constexpr int SUMS = 16;  // vectors kept in registers: T tokens by SUMS / T vectors of columns
typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

inline Floats load(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline float one(const float* p) { return *p; }
inline void put(float* p, float v) { *p = v; }

inline Floats load(const at::BFloat16* p) {
  Halves h; std::memcpy(&h, p, sizeof h);
  Words w = __builtin_convertvector(h, Words) << 16;
  Floats v; std::memcpy(&v, &w, sizeof v); return v;
}
inline void store(at::BFloat16* p, Floats v) {
  Words w; std::memcpy(&w, &v, sizeof w);
  Words even = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  Words quiet = (w >> 16) | 0x40u;  // a NaN stays one: rounding could carry it over
  Words r = (w & 0x7fffffffu) > 0x7f800000u ? quiet : even;
  Halves h = __builtin_convertvector(r, Halves);
  std::memcpy(p, &h, sizeof h);
}
inline float one(const at::BFloat16* p) { return static_cast<float>(*p); }
inline void put(at::BFloat16* p, float v) { *p = static_cast<at::BFloat16>(v); }

template <class S>
struct Job {
  const S *x, *V, *U, *cores;
  S* y;
  const int64_t *spans, *rows, *tokens;  // tokens: nullptr = all, in order
  int64_t n, i, m, k, ldx, ldy, ldc;
};

// sum[b][0 .. N*LANES) += sum over `depth` of a[b][d] * B[d][..]; added in one order, whatever T and N
template <int T, int N, class S>
inline void product(const float* a, int64_t lda, int64_t depth, const S* B, int64_t ldb, Floats (&sum)[T][N]) {
  for (int64_t d = 0; d < depth; ++d) {
    Floats b[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) b[j] = load(B + d * ldb + j * LANES);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const float v = a[t * lda + d];
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) sum[t][j] += v * b[j];
    }
  }
}

template <int T, int N, class S>
void down(const float* x, const Job<S>& job, int64_t column, float* t) {
  Floats sum[T][N] = {};
  const int64_t w = job.m * job.k;
  product<T, N>(x, job.i, job.i, job.V + column, w, sum);
  for (int b = 0; b < T; ++b)
    for (int j = 0; j < N; ++j) store(t + b * w + column + j * LANES, sum[b][j]);
}

template <int T, int N, class S>
void up(const float* s, const Job<S>& job, const S* U, int64_t size, int64_t column, S* const* y, int64_t live) {
  Floats sum[T][N] = {};
  product<T, N>(s, job.m * job.k, job.k, U + column, size, sum);
  for (int b = 0; b < live; ++b)
    for (int j = 0; j < N; ++j) {
      S* at = y[b] + column + j * LANES;
      store(at, load(at) + sum[b][j]);
    }
}

// call(N, column) for panels of N vectors, as wide as they fit; the first column that none covers
template <int N, class Call>
int64_t panels(int64_t column, int64_t end, const Call& call) {
  for (; column + N * LANES <= end; column += N * LANES) call(std::integral_constant<int, N>{}, column);
  if constexpr (N > 1) return panels<N / 2>(column, end, call);
  return column;
}

template <class S>
void apply_cores(const Job<S>& job, const float* t, float* s, const S* core) {
  for (int64_t p = 0; p < job.m; ++p, core += job.k * job.k) {
    const float* from = t + p * job.k;
    float* to = s + p * job.k;
    int64_t o = 0;
    for (; o + LANES <= job.k; o += LANES) {
      Floats sum = {};
      for (int64_t i = 0; i < job.k; ++i) sum += from[i] * load(core + i * job.k + o);
      store(to + o, sum);
    }
    for (; o < job.k; ++o) {
      float sum = 0;
      for (int64_t i = 0; i < job.k; ++i) sum += from[i] * one(core + i * job.k + o);
      to[o] = sum;
    }
  }
}

template <int T, class S>
void tile(const Job<S>& job, int64_t first, int64_t live, std::vector<float>& space) {
  const int64_t w = job.m * job.k;
  space.resize(T * (job.i + 2 * w));
  float *x = space.data(), *t = x + T * job.i, *s = t + T * w;
  S* y[T];
  for (int64_t b = 0; b < live; ++b) {  // rows beyond these hold any numbers: nothing of them is kept
    const int64_t token = job.tokens ? job.tokens[first + b] : first + b;
    y[b] = job.y + token * job.ldy;
    const S* from = job.x + token * job.ldx;
    for (int64_t i = 0; i < job.i; ++i) x[b * job.i + i] = one(from + i);
  }
  int64_t c = panels<SUMS / T>(0, w, [&](auto n, int64_t column) { down<T, n()>(x, job, column, t); });
  for (; c < w; ++c)
    for (int64_t b = 0; b < live; ++b) {
      float sum = 0;
      for (int64_t i = 0; i < job.i; ++i) sum += x[b * job.i + i] * one(job.V + i * w + c);
      t[b * w + c] = sum;
    }
  for (int64_t b = 0; b < live; ++b)
    apply_cores(job, t + b * w, s + b * w, job.cores + job.rows[first + b] * job.ldc);
  const S* U = job.U;
  for (int64_t p = 0; p < job.m; ++p) {
    const int64_t at = job.spans[2 * p], size = job.spans[2 * p + 1];
    const float* from = s + p * job.k;
    S* to[T];
    for (int64_t b = 0; b < live; ++b) to[b] = y[b] + at;
    int64_t o = panels<SUMS / T>(
        0, size, [&](auto n, int64_t column) { up<T, n()>(from, job, U, size, column, to, live); });
    for (; o < size; ++o)
      for (int64_t b = 0; b < live; ++b) {
        float sum = one(to[b] + o);
        for (int64_t i = 0; i < job.k; ++i) sum += from[b * w + i] * one(U + i * size + o);
        put(to[b] + o, sum);
      }
    U += job.k * size;
  }
}

// A tile of few tokens has fewer rows and wider panels: the basis is then read in longer runs.
template <class S>
void tile_of(const Job<S>& job, int64_t first, std::vector<float>& space) {
  const int64_t live = std::min(TILE, job.n - first);
  if (live == 1) tile<1>(job, first, live, space);
  else if (live == 2) tile<2>(job, first, live, space);
  else if (live <= 4) tile<4>(job, first, live, space);
  else tile<TILE>(job, first, live, space);
}

template <class S>
void run(const at::Tensor& x, at::Tensor& y, const at::Tensor& V, const at::Tensor& U, const at::Tensor& cores,
         const at::Tensor& spans, const at::Tensor& rows, const std::optional<at::Tensor>& tokens, int64_t k,
         int64_t offset) {
  Job<S> job;
  job.x = x.const_data_ptr<S>(), job.y = y.mutable_data_ptr<S>();
  job.V = V.const_data_ptr<S>(), job.U = U.const_data_ptr<S>();
  job.cores = cores.const_data_ptr<S>() + offset;
  job.spans = spans.const_data_ptr<int64_t>(), job.rows = rows.const_data_ptr<int64_t>();
  job.tokens = tokens ? tokens->const_data_ptr<int64_t>() : nullptr;
  job.n = rows.size(0), job.i = x.size(1), job.m = spans.size(0), job.k = k;
  job.ldx = x.stride(0), job.ldy = y.stride(0), job.ldc = cores.stride(0);
  const int64_t tiles = (job.n + TILE - 1) / TILE;
  at::parallel_for(0, tiles, GRAIN, [&](int64_t begin, int64_t end) {
    std::vector<float> space;
    for (int64_t number = begin; number < end; ++number) tile_of(job, number * TILE, space);
  });
}

void apply(const at::Tensor& x, at::Tensor y, const at::Tensor& V, const at::Tensor& U, const at::Tensor& cores,
           const at::Tensor& spans, const at::Tensor& rows, const std::optional<at::Tensor>& tokens, int64_t k,
           int64_t offset) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.stride(1) == 1 && y.stride(1) == 1, "rows must be contiguous");
  TORCH_CHECK(V.size(0) == x.size(1), "x has ", x.size(1), " features, V has ", V.size(0), " rows");
  TORCH_CHECK(tokens ? tokens->size(0) == rows.size(0) : rows.size(0) <= x.size(0), "more rows than tokens");
  TORCH_CHECK(x.scalar_type() == y.scalar_type() && V.scalar_type() == x.scalar_type() &&
              cores.scalar_type() == x.scalar_type(), "x, y and the tables must have one type");
  if (x.scalar_type() == at::kFloat)
    run<float>(x, y, V, U, cores, spans, rows, tokens, k, offset);
  else if (x.scalar_type() == at::kBFloat16)
    run<at::BFloat16>(x, y, V, U, cores, spans, rows, tokens, k, offset);
  else
    TORCH_CHECK(false, "float32 and bfloat16 only, got ", x.scalar_type());
}

}  // namespace

TORCH_LIBRARY(soppu_native, library) {
  library.def(
      "apply(Tensor x, Tensor(a!) y, Tensor V, Tensor U, Tensor cores, Tensor spans, Tensor rows,"
      " Tensor? tokens, int k, int offset) -> ()",
      {at::Tag::pt2_compliant_tag});
  library.impl("apply", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(apply)));
}
