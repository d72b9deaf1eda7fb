// Attention of rows over their blocks: T new tokens of each row, whose keys and values are written first and
// then looked at together with those before them, block by block through the row's table. Nothing is gathered.
// What a token attends to is summed in one order: it is the same, bit for bit, whoever else is in the batch and
// whether the tokens before it were read with it or earlier. Plain C: no torch is included.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int64_t BLOCK = 16;  // tokens
constexpr int LANES = 16;      // of a vector
constexpr int64_t FEW = 1 << 15;  // numbers of keys; for fewer, threads are not worth their waking
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

struct Job {
  const void *q, *k, *v;     // (rows T, heads, d) each; the strides are from token to token, in numbers
  void *out;                 // (rows T, q_heads, d)
  void *blocks;              // (n, 2, kv_heads, BLOCK, d)
  const int32_t *table;      // of this layer: a row's blocks begin at table + places[row] * table_stride
  const int64_t *places, *starts, *counts;  // of the T tokens the first `counts` are the row's own
  int64_t rows, tokens, q_heads, kv_heads, d, q_stride, k_stride, v_stride, table_stride, threads;
};

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y; std::memcpy(&y, &bits, sizeof y); return y;
}
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, uint16_t* to) {
  uint32_t bits; std::memcpy(&bits, &x, sizeof bits);
  *to = (bits & 0x7fffffffu) > 0x7f800000u ? uint16_t((bits >> 16) | 0x40u)
                                           : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline Floats load(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// e^x for x <= 0, within two units in the last place, 0 below -87
inline Floats exponential(Floats x) {
  const Floats n = __builtin_convertvector(
      __builtin_convertvector(x * 1.44269504f - 0.5f, Integers), Floats);  // towards zero: the nearest below 0
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  Floats scale; std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? Floats{} : p * scale;  // what is not a number stays so
}

template <int WIDTH>  // x's and y's lanes, each run of WIDTH added to the next; x's and y's take turns
inline Floats paired(Floats x, Floats y) {
  const auto mask = [](auto second) {
    return []<int... lane>(std::integer_sequence<int, lane...>) {
      return Words{uint32_t(lane / (2 * WIDTH) * 2 * WIDTH + lane % WIDTH + decltype(second)::value * WIDTH +
                            lane / WIDTH % 2 * LANES)...};
    }(std::make_integer_sequence<int, LANES>{});
  };
  return __builtin_shuffle(x, y, mask(std::integral_constant<int, 0>{})) +
         __builtin_shuffle(x, y, mask(std::integral_constant<int, 1>{}));
}

template <int FIRST, int WIDTH>  // lane t of the whole: the sum of partial[t]'s lanes
inline Floats across(const Floats* partial) {
  if constexpr (WIDTH == 0) return partial[FIRST];
  else return paired<WIDTH>(across<FIRST, WIDTH / 2>(partial), across<FIRST + WIDTH, WIDTH / 2>(partial));
}

// One side of a block as float32 rows of N vectors: where it lies, or copied into `space`.
template <int N>
inline const float* rows(const float* from, float* space, int64_t d) {
  if (d == N * LANES) return from;
  for (int64_t t = 0; t < BLOCK; ++t) std::memcpy(space + t * N * LANES, from + t * d, d * sizeof(float));
  return space;
}
template <int N>
inline const float* rows(const uint16_t* from, float* space, int64_t d) {
  for (int64_t t = 0; t < BLOCK; ++t)
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) space[t * N * LANES + i] = widen(from[t * d + i]);
  return space;
}

// scores[g][..]: of G queries with the tokens of one block
template <int N, int G>
inline void multiply(const float* q, const float* k, float* scores, int64_t width) {
  Floats own[G][N], partial[G][BLOCK];
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n) own[g][n] = load(q + (g * N + n) * LANES);
  for (int t = 0; t < BLOCK; ++t) {
    Floats key[N];
    for (int n = 0; n < N; ++n) key[n] = load(k + (t * N + n) * LANES);
    for (int g = 0; g < G; ++g) {
      Floats sum = own[g][0] * key[0];
      for (int n = 1; n < N; ++n) sum += own[g][n] * key[n];
      partial[g][t] = sum;
    }
  }
  for (int g = 0; g < G; ++g) store(scores + g * width, across<0, LANES / 2>(partial[g]));
}

struct Place {
  int64_t row, token, head;
};

template <class S, int N, int G>
void group(const Job& job, Place at, int64_t query, std::vector<float>& space) {
  const int64_t row = at.row, h = at.head, number = row * job.tokens + at.token;
  const int64_t d = job.d, seen = job.starts[row] + at.token + 1, count = (seen + BLOCK - 1) / BLOCK, width = count * BLOCK;
  space.assign(G * width + (G + BLOCK) * N * LANES, 0.0f);
  float *scores = space.data(), *q = scores + G * width, *wide = q + G * N * LANES;
  const int32_t* table = job.table + job.places[row] * job.table_stride;
  const int64_t size = BLOCK * d, side = job.kv_heads * size;
  const auto keys = [&](int64_t b) { return static_cast<S*>(job.blocks) + table[b] * 2 * side + h * size; };
  const S* queries = static_cast<const S*>(job.q) + number * job.q_stride + query * d;
  const float scale = 1.0f / std::sqrt(float(d));
  for (int64_t g = 0; g < G; ++g)
    for (int64_t i = 0; i < d; ++i) q[g * N * LANES + i] = widen(queries[g * d + i]) * scale;
  for (int64_t b = 0; b < count; ++b) multiply<N, G>(q, rows<N>(keys(b), wide, d), scores + b * BLOCK, width);
  for (int64_t g = 0; g < G; ++g) {
    float *own = scores + g * width, most = own[0];
    for (int64_t t = 1; t < seen; ++t) most = std::max(most, own[t]);
    Floats total = {};
    for (int64_t t = seen; t < width; ++t) own[t] = -INFINITY;
    for (int64_t t = 0; t < width; t += LANES) {
      const Floats e = exponential(load(own + t) - most);
      store(own + t, e);
      total += e;
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += total[lane];
    for (int64_t t = 0; t < width; t += LANES) store(own + t, load(own + t) / sum);
  }
  Floats sums[G][N] = {};
  for (int64_t b = 0; b < count; ++b) {
    const float* v = rows<N>(keys(b) + side, wide, d);
    const int64_t tokens = std::min(BLOCK, seen - b * BLOCK);
    for (int64_t t = 0; t < tokens; ++t)
      for (int n = 0; n < N; ++n) {
        const Floats value = load(v + (t * N + n) * LANES);
        for (int g = 0; g < G; ++g) sums[g][n] += scores[g * width + b * BLOCK + t] * value;
      }
  }
  S* out = static_cast<S*>(job.out) + (number * job.q_heads + query) * d;
  for (int g = 0; g < G; ++g)
    for (int64_t i = 0; i < d; ++i) narrow(sums[g][i / LANES][i % LANES], out + g * d + i);
}

template <class S>
void remember(const Job& job, Place at) {
  const int64_t d = job.d, position = job.starts[at.row] + at.token, number = at.row * job.tokens + at.token;
  const int64_t size = BLOCK * d, side = job.kv_heads * size;
  const int64_t block = job.table[job.places[at.row] * job.table_stride + position / BLOCK];
  S* to = static_cast<S*>(job.blocks) + block * 2 * side + at.head * size + position % BLOCK * d;
  std::memcpy(to, static_cast<const S*>(job.k) + number * job.k_stride + at.head * d, d * sizeof(S));
  std::memcpy(to + side, static_cast<const S*>(job.v) + number * job.v_stride + at.head * d, d * sizeof(S));
}

template <class S, int N>
void head(const Job& job, Place at, std::vector<float>& space) {
  const int64_t queries = job.q_heads / job.kv_heads, end = (at.head + 1) * queries;
  int64_t query = at.head * queries;
  if constexpr (N <= 4) {
    for (; query + 4 <= end; query += 4) group<S, N, 4>(job, at, query, space);
    if (query + 3 == end) return group<S, N, 3>(job, at, query, space);
  }
  for (; query + 2 <= end; query += 2) group<S, N, 2>(job, at, query, space);
  if (query < end) group<S, N, 1>(job, at, query, space);
}

template <class S>
void run(const Job& job) {
  using Head = void (*)(const Job&, Place, std::vector<float>&);
  constexpr Head of[] = {head<S, 1>, head<S, 2>, head<S, 3>, head<S, 4>,
                         head<S, 5>, head<S, 6>, head<S, 7>, head<S, 8>};
  const Head work = of[(job.d - 1) / LANES];
  std::vector<Place> places;  // tokens of one head together: they read the same blocks
  int64_t read = 0;
  for (int64_t row = 0; row < job.rows; ++row)
    for (int64_t h = 0; h < job.kv_heads; ++h)
      for (int64_t token = 0; token < job.counts[row]; ++token) {
        places.push_back({row, token, h});
        read += (job.starts[row] + token + 1) * job.d;
      }
  if (job.tokens > 1 || !job.q)  // a token sees those written beside it
    for (const Place& at : places) remember<S>(job, at);
  if (!job.q) return;
  const int64_t chunk = job.tokens > 1 ? 16 : 1;
#pragma omp parallel num_threads(read < FEW ? 1 : int(job.threads))
  {
    std::vector<float> space;
#pragma omp for schedule(dynamic, chunk)
    for (size_t number = 0; number < places.size(); ++number) {
      if (job.tokens == 1) remember<S>(job, places[number]);
      work(job, places[number], space);
    }
  }
}

}  // namespace

extern "C" void soppu_attend(const Job* job, int64_t halves) {
  if (halves) run<uint16_t>(*job);
  else run<float>(*job);
}
