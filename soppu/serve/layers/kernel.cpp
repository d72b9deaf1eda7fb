// y += (U S_user V^T + sum_j p_j q_j^T) x for a batch of tokens of many users, in one pass over tiles of up to 8
// tokens; p_j and q_j are read as the integers of `records.py`, once for all tokens of a user in a tile. CPU only.
// Vectors are GCC's own, so the compiler picks the instructions; sums are float32 in every type of storage.
// What a token gets does not depend on its company: every sum has one order, however many are in the tile.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16, TILE = 8, GRAIN = 1;
constexpr int64_t SPARE = 3;  // rows that a user's tokens, rounded up to 1, 2, 4 or 8, may go beyond a tile's
constexpr int64_t PAD = 80;  // zeros behind a vector that is read by rows: the last digits of a row say nothing
constexpr int SUMS = 16;  // vectors kept in registers: T tokens by SUMS / T vectors of columns
typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
typedef int16_t Shorts __attribute__((vector_size(32), aligned(2)));
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(1)));
typedef int8_t Chars __attribute__((vector_size(16), aligned(1)));

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

template <int N> inline float total(const float* p) {
  typedef float Half __attribute__((vector_size(2 * N), aligned(4)));
  Half low, high; std::memcpy(&low, p, sizeof low); std::memcpy(&high, p + N / 2, sizeof high);
  low += high;
  float a[N / 2]; std::memcpy(a, &low, sizeof low);
  if constexpr (N > 4) return total<N / 2>(a);
  else return a[0] + a[1];
}

// ---- rows of integers, see records.py

enum Kind { SPARSE, BYTES, NIBBLES, FIVES, THREES, FLOAT };
constexpr uint32_t IN_COORDS = 1u << 31, OUT_COORDS = 1u << 30;

struct Row { int kind, exceptions, component; bool coords; float scale; const uint8_t* numbers; };

struct Record {  // one user at one module
  const uint32_t* words; int64_t right, left, components; uint32_t flags;
  Row row(int64_t number) const {
    const uint32_t* h = words + 3 + 3 * number;
    float scale; std::memcpy(&scale, h + 1, sizeof scale);
    const bool coords = *h >> 7 & 1;
    return {int(*h & 0x7f), int(*h >> 8 & 0xff), int(*h >> 16), coords, scale, (const uint8_t*)(words + h[2])};
  }
};

inline bool record(const uint32_t* data, const int64_t* starts, int64_t user, int64_t module, Record& found) {
  if (user < 0 || module < 0 || starts[user] == starts[user + 1]) return false;
  const uint32_t* begin = data + starts[user];
  if (!begin[module]) return false;
  const uint32_t* w = begin + begin[module];
  found = {w, w[0], w[1], w[2] & (OUT_COORDS - 1), w[2] & (IN_COORDS | OUT_COORDS)};
  return true;
}

constexpr int digits(int kind) { return kind == NIBBLES ? 2 : kind == FIVES ? 3 : kind == THREES ? 5 : 1; }

// entries of a row of `d` numbers: bytes, or floats; whole vectors of them
inline int64_t entries(int kind, int64_t d) {
  return kind == SPARSE ? 0 : ((d + digits(kind) - 1) / digits(kind) + LANES - 1) / LANES * LANES;
}

#ifdef __AVX512F__
inline Ints ints(Bytes v) { return (Ints)_mm512_cvtepu8_epi32((__m128i)v); }
inline Ints ints(Chars v) { return (Ints)_mm512_cvtepi8_epi32((__m128i)v); }
#else  // step by step: GCC takes the numbers apart where it has no one conversion for the whole way
inline Ints ints(Bytes v) { return __builtin_convertvector(__builtin_convertvector(v, Halves), Ints); }
inline Ints ints(Chars v) { return __builtin_convertvector(__builtin_convertvector(v, Shorts), Ints); }
#endif
inline Ints ints(Halves v) { return __builtin_convertvector(v, Ints); }
inline Floats floats(Ints v, int bias) { return __builtin_convertvector(v - bias, Floats); }

// 16 entries from `at` on, digit by digit; digit g of entry j is number g * entries + j
template <int KIND> inline void widen(const uint8_t* numbers, int64_t at, Floats (&v)[digits(KIND)]) {
  if constexpr (KIND == FLOAT) {
    v[0] = load(reinterpret_cast<const float*>(numbers) + at);
  } else if constexpr (KIND == BYTES) {
    Chars c; std::memcpy(&c, numbers + at, sizeof c);
    v[0] = floats(ints(c), 0);
  } else {
    Bytes b; std::memcpy(&b, numbers + at, sizeof b);
    if constexpr (KIND == NIBBLES) {
      const Ints w = ints(b);
      v[0] = floats(w & 15, 7), v[1] = floats(w >> 4, 7);
    } else {  // division by multiplication: exact for all bytes
      constexpr uint16_t base = KIND == FIVES ? 5 : 3, times = KIND == FIVES ? 205 : 171;
      Halves h = __builtin_convertvector(b, Halves);
      for (int g = 0; g + 1 < digits(KIND); ++g) {
        const Halves next = (h * times) >> (KIND == FIVES ? 10 : 9);
        v[g] = floats(ints(h - next * base), base / 2);
        h = next;
      }
      v[digits(KIND) - 1] = floats(ints(h), base / 2);
    }
  }
}

// call(place, what is missing there)
template <class Call> inline void exceptions(const Row& row, int64_t d, const Call& call) {
  const uint8_t* from = row.numbers + entries(row.kind, d) * (row.kind == FLOAT ? 4 : 1);
  for (int e = 0; e < row.exceptions; ++e) {
    uint32_t word; std::memcpy(&word, from + 4 * e, sizeof word);
    call(word >> 8, static_cast<float>(static_cast<int8_t>(word & 0xff)));
  }
}

// out[component of row][t] += scale * (row . x[t]) for C rows of one kind and T tokens
template <int KIND, int C, int T>
void dots(const Row* rows, int64_t d, const float* x, int64_t ldx, float* out) {
  const int64_t n = entries(KIND, d);
  Floats sum[C][T] = {};
  for (int64_t j = 0; j < n; j += LANES) {
    Floats v[C][digits(KIND)];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) widen<KIND>(rows[c].numbers, j, v[c]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 5
      for (int g = 0; g < digits(KIND); ++g) {
        const Floats from = load(x + t * ldx + g * n + j);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[c][t] += v[c][g] * from;
      }
  }
  for (int c = 0; c < C; ++c)
    for (int t = 0; t < T; ++t) {
      float lanes[LANES]; store(lanes, sum[c][t]);
      float made = total<LANES>(lanes);
      exceptions(rows[c], d, [&](int64_t at, float v) { made += v * x[t * ldx + at]; });
      out[rows[c].component * TILE + t] += rows[c].scale * made;
    }
}

// y[t] += sum over C rows of scale * weight[component][t] * row, for T tokens
template <int KIND, int C, int T>
void adds(const Row* rows, int64_t d, const float* weight, float* y, int64_t ldy) {
  const int64_t n = entries(KIND, d);
  float w[C][T];
  for (int c = 0; c < C; ++c)
    for (int t = 0; t < T; ++t) w[c][t] = rows[c].scale * weight[rows[c].component * TILE + t];
  for (int64_t j = 0; j < n; j += LANES) {
    Floats v[C][digits(KIND)];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) widen<KIND>(rows[c].numbers, j, v[c]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 5
      for (int g = 0; g < digits(KIND); ++g) {
        float* at = y + t * ldy + g * n + j;
        Floats made = load(at);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) made += w[c][t] * v[c][g];
        store(at, made);
      }
  }
  for (int c = 0; c < C; ++c)
    for (int t = 0; t < T; ++t) {
      exceptions(rows[c], d, [&](int64_t at, float v) { y[t * ldy + at] += w[c][t] * v; });
    }
}

// call(rows, how many as a constant) for groups of up to C neighbours of one kind
template <int C, class Call>
void grouped(const Record& r, int64_t begin, int64_t end, bool coords, const Call& call) {
  Row rows[C];
  for (int64_t j = begin; j < end;) {
    int many = 0;
    for (; many < C && j + many < end; ++many) {
      rows[many] = r.row(j + many);
      if (rows[many].kind != rows[0].kind || rows[many].coords != rows[0].coords) break;
    }
    if (rows[0].coords != coords) { j += many; continue; }
    if (many == C) { call(rows, std::integral_constant<int, C>{}); j += C; }
    else { call(rows, std::integral_constant<int, 1>{}); ++j; }
  }
}

// call(kind as a constant)
template <class Call> void of_kind(int kind, const Call& call) {
  switch (kind) {
    case SPARSE: return call(std::integral_constant<int, SPARSE>{});
    case BYTES: return call(std::integral_constant<int, BYTES>{});
    case NIBBLES: return call(std::integral_constant<int, NIBBLES>{});
    case FIVES: return call(std::integral_constant<int, FIVES>{});
    case THREES: return call(std::integral_constant<int, THREES>{});
    default: return call(std::integral_constant<int, FLOAT>{});
  }
}

struct Panel { const float* at; int64_t ld, d; };  // T tokens of d numbers, PAD zeros or more behind each

template <int T> void read_rows(const Record& r, bool coords, Panel x, float* out) {
  grouped<T <= 2 ? 4 : 2>(r, 0, r.right, coords, [&](const Row* rows, auto many) {
    of_kind(rows[0].kind, [&](auto kind) { dots<kind(), many(), T>(rows, x.d, x.at, x.ld, out); });
  });
}

template <int T> void write_rows(const Record& r, bool coords, const float* weight, float* y, int64_t ld, int64_t d) {
  grouped<4>(r, r.right, r.right + r.left, coords, [&](const Row* rows, auto many) {
    of_kind(rows[0].kind, [&](auto kind) { adds<kind(), many(), T>(rows, d, weight, y, ld); });
  });
}

// ---- the bases, and a tile of tokens

struct Span { int64_t at, size, module, ko, ki; };  // of a part: its columns, its number in records, its own ranks

template <class S>
struct Job {
  const S *x, *V, *U, *cores;
  S* y;
  const Span* spans;
  const int64_t *rows, *tokens, *users;  // tokens: nullptr = all, in order; users: nullptr = none
  const uint32_t* data;
  const int64_t* starts;
  int64_t n, i, m, ki, ko, w, ldx, ldy, ldc;  // w: numbers in a row of t, whole panels of them
};

struct Space {  // of one thread
  std::vector<float> x, t, s, sum, from, to, weight;
  std::vector<uint32_t> pairs;
};

// A basis lies in panels of LANES columns, in each one unit of 64 bytes after the other: a row of floats, or two
// rows of bfloat16, number beside number. Zeros fill the last panel and the last unit.
template <class S> constexpr int64_t DEEP = 4 / sizeof(S);  // rows in a unit

#ifdef __AVX512BF16__  // what a unit is multiplied with: a float, or two bfloat16 where there is a product of pairs
template <class S> using Factor = std::conditional_t<DEEP<S> == 2, uint32_t, float>;
#else
template <class S> using Factor = float;
#endif
template <class S> constexpr bool PAIRS = std::is_same_v<Factor<S>, uint32_t>;

inline int64_t up_to(int64_t number, int64_t step) { return (number + step - 1) / step; }

template <class S> int64_t panel(int64_t depth) { return up_to(depth, DEEP<S>) * DEEP<S> * LANES; }  // numbers

// `depth` numbers as pairs; the last one may have a zero beside it
inline void paired(const float* from, int64_t depth, uint32_t* to) {
  for (int64_t d = 0; d < depth; d += 2) {
    at::BFloat16 two[2] = {static_cast<at::BFloat16>(from[d]), static_cast<at::BFloat16>(d + 1 < depth ? from[d + 1] : 0.f)};
    std::memcpy(to + d / 2, two, sizeof two);
  }
}
inline void paired(const at::BFloat16* from, int64_t depth, uint32_t* to) {
  to[(depth - 1) / 2] = 0;
  std::memcpy(to, from, depth * sizeof *from);
}

// sum[b][..] += sum over `depth` of a[b][d] * B[d][..] for N panels; added in one order, whatever T and N
template <int T, int N, class S>
inline void product(const Factor<S>* a, int64_t lda, int64_t depth, const S* B, Floats (&sum)[T][N]) {
  const int64_t ldb = panel<S>(depth);
  for (int64_t u = 0; u < up_to(depth, DEEP<S>); ++u) {
    Words b[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) std::memcpy(&b[j], B + j * ldb + u * DEEP<S> * LANES, sizeof b[j]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        if constexpr (DEEP<S> == 1) {
          Floats row; std::memcpy(&row, &b[j], sizeof row);
          sum[t][j] += a[t * lda + u] * row;
        } else if constexpr (PAIRS<S>) {
#ifdef __AVX512BF16__
          sum[t][j] = (Floats)_mm512_dpbf16_ps((__m512)sum[t][j], (__m512bh)b[j], (__m512bh)_mm512_set1_epi32(a[t * lda + u]));
#endif
        } else {
          const Words even = b[j] << 16, odd = b[j] & 0xffff0000u;
          Floats row; std::memcpy(&row, &even, sizeof row);
          sum[t][j] += a[t * lda + 2 * u] * row;
          std::memcpy(&row, &odd, sizeof row);
          sum[t][j] += a[t * lda + 2 * u + 1] * row;
        }
      }
    }
  }
}

// call(N, panel) for groups of N panels, as many as registers hold, then of half as many
template <int N, class Call>
void panels(int64_t at, int64_t end, const Call& call) {
  for (; at + N <= end; at += N) call(std::integral_constant<int, N>{}, at);
  if constexpr (N > 1) panels<N / 2>(at, end, call);
}

// t (T, w) = x V
template <int T, class S>
void down(const Job<S>& job, const Factor<S>* x, int64_t ldx, float* t) {
  panels<SUMS / T>(0, job.w / LANES, [&](auto n, int64_t at) {
    Floats sum[T][n()] = {};
    product<T, n(), S>(x, ldx, job.i, job.V + at * panel<S>(job.i), sum);
    for (int b = 0; b < T; ++b)
      for (int j = 0; j < n(); ++j) store(t + b * job.w + (at + j) * LANES, sum[b][j]);
  });
}

// s (m k_out) = the core of one row, part by part. The last load of a core's row may go beyond it, at most into the
// table's last row, which is nobody's.
template <class S>
void apply_cores(const Job<S>& job, const float* t, float* s, const S* core) {
  for (int64_t p = 0; p < job.m; ++p, core += job.ki * job.ko) {
    const float* from = t + p * job.ki;
    float* to = s + p * job.ko;
    for (int64_t o = 0; o < job.ko; o += LANES) {
      Floats sum = {};
      for (int64_t i = 0; i < job.ki; ++i) sum += from[i] * load(core + i * job.ko + o);
      if (o + LANES <= job.ko) { store(to + o, sum); continue; }
      float made[LANES]; store(made, sum);
      std::copy_n(made, job.ko - o, to + o);
    }
  }
}

// y += sum for up to LANES numbers
template <class S>
inline void plus(Floats sum, int64_t many, S* y) {
  if (many == LANES) return store(y, load(y) + sum);
  float numbers[LANES]; store(numbers, sum);
  for (int64_t o = 0; o < many; ++o) put(y + o, one(y + o) + numbers[o]);
}

// y += s U + sum for one part; `sum` may be nullptr
template <int T, class S>
void up(const Job<S>& job, const Factor<S>* s, int64_t lds, const S* U, int64_t size, S* const* y, int64_t live,
        const float* sum) {
  const int64_t ld = size + PAD;
  panels<SUMS / T>(0, up_to(size, LANES), [&](auto n, int64_t at) {
    Floats made[T][n()] = {};
    product<T, n(), S>(s, lds, job.ko, U + at * panel<S>(job.ko), made);
    for (int b = 0; b < live; ++b)
      for (int j = 0; j < n(); ++j) {
        const int64_t column = (at + j) * LANES;
        if (sum) made[b][j] += load(sum + b * ld + column);
        plus(made[b][j], std::min(LANES, size - column), y[b] + column);
      }
  });
}

template <class S>
void plus(const float* sum, int64_t size, S* y) {
  for (int64_t o = 0; o < size; o += LANES) plus(load(sum + o), std::min(LANES, size - o), y + o);
}

// One user's tokens, T or fewer: what the record adds to s and to the sum of outputs of one part.
template <int T, class S>
void own(const Job<S>& job, const Record& r, int64_t first, int64_t part, int64_t live, Space& space) {
  const int64_t size = job.spans[part].size, ldx = job.i + PAD;
  const int64_t ko = job.spans[part].ko, ki = job.spans[part].ki;  // as long as rows of coordinates are
  space.weight.assign(r.components * TILE, 0);
  if (r.flags & IN_COORDS) {
    const int64_t ld = ki + PAD;
    space.from.assign(T * ld, 0);
    for (int64_t b = 0; b < live; ++b)
      std::copy_n(&space.t[(first + b) * job.w + part * job.ki], ki, &space.from[b * ld]);
    read_rows<T>(r, true, {space.from.data(), ld, ki}, space.weight.data());
  }
  read_rows<T>(r, false, {&space.x[first * ldx], ldx, job.i}, space.weight.data());
  for (int64_t c = 0; c < r.components; ++c)  // of tokens that are not this user's
    for (int64_t b = live; b < T; ++b) space.weight[c * TILE + b] = 0;
  write_rows<T>(r, false, space.weight.data(), &space.sum[first * (size + PAD)], size + PAD, size);
  if (r.flags & OUT_COORDS) {
    const int64_t ld = ko + PAD;
    space.to.assign(T * ld, 0);
    write_rows<T>(r, true, space.weight.data(), space.to.data(), ld, ko);
    for (int64_t b = 0; b < live; ++b)
      for (int64_t k = 0; k < ko; ++k)
        space.s[(first + b) * job.m * job.ko + part * job.ko + k] += space.to[b * ld + k];
  }
}

// Whether anybody in the tile uses the bases, input and output side, or has a record at a part
template <class S>
struct Needs {
  bool in = false, out = false, own = false;
  Needs(const Job<S>& job, int64_t first, int64_t live) {
    for (int64_t b = 0; b < live; ++b) {
      const bool core = job.rows[first + b] >= 0 && job.ki && job.ko;
      in |= core, out |= core;
      for (int64_t p = 0; job.users && p < job.m; ++p) {
        Record r;
        if (!record(job.data, job.starts, job.users[first + b], job.spans[p].module, r)) continue;
        own = true, in |= bool(r.flags & IN_COORDS), out |= bool(r.flags & OUT_COORDS);
      }
    }
  }
};

template <class S>
void own_part(const Job<S>& job, int64_t first, int64_t live, int64_t part, Space& space) {
  for (int64_t b = 0, next; b < live; b = next) {
    const int64_t user = job.users[first + b];
    for (next = b + 1; next < live && job.users[first + next] == user;) ++next;
    Record r;
    if (!record(job.data, job.starts, user, job.spans[part].module, r)) continue;
    const int64_t many = next - b;
    if (many == 1) own<1>(job, r, b, part, many, space);
    else if (many == 2) own<2>(job, r, b, part, many, space);
    else if (many <= 4) own<4>(job, r, b, part, many, space);
    else own<TILE>(job, r, b, part, many, space);
  }
}

// What V is multiplied with, T rows: x as it is, or its pairs
template <int T, class S>
void into_basis(const Job<S>& job, const S* const* rows, int64_t live, Space& space) {
  if constexpr (PAIRS<S>) {
    const int64_t ld = up_to(job.i, 2);
    space.pairs.resize(T * ld);
    for (int64_t b = 0; b < live; ++b) paired(rows[b], job.i, &space.pairs[b * ld]);
    down<T>(job, space.pairs.data(), ld, space.t.data());
  } else {
    down<T>(job, space.x.data(), job.i + PAD, space.t.data());
  }
}

// What U is multiplied with: one part of s
template <int T, class S>
void out_of_basis(const Job<S>& job, const S* U, int64_t part, S* const* y, int64_t live, const float* sum, Space& space) {
  const int64_t size = job.spans[part].size, lds = job.m * job.ko;
  const float* s = space.s.data() + part * job.ko;
  if constexpr (PAIRS<S>) {
    const int64_t ld = up_to(job.ko, 2);
    space.pairs.resize(T * ld);
    for (int64_t b = 0; b < live; ++b) paired(s + b * lds, job.ko, &space.pairs[b * ld]);
    up<T>(job, space.pairs.data(), ld, U, size, y, live, sum);
  } else {
    const int64_t ld = up_to(job.ko, DEEP<S>) * DEEP<S>;
    space.from.assign(T * ld, 0);
    for (int64_t b = 0; b < live; ++b) std::copy_n(s + b * lds, job.ko, &space.from[b * ld]);
    up<T>(job, space.from.data(), ld, U, size, y, live, sum);
  }
}

template <int T, class S>
void tile(const Job<S>& job, int64_t first, int64_t live, Space& space) {
  const Needs<S> needs(job, first, live);
  if (!needs.in && !needs.own) return;
  const int64_t ldx = job.i + PAD;
  space.x.resize((live + SPARE) * ldx), space.t.resize(T * job.w);
  space.s.assign(T * job.m * job.ko, 0);
  S* y[T];
  const S* x[T];
  for (int64_t b = 0; b < live; ++b) {  // rows beyond these hold any numbers: nothing of them is kept
    const int64_t token = job.tokens ? job.tokens[first + b] : first + b;
    y[b] = job.y + token * job.ldy, x[b] = job.x + token * job.ldx;
    if (PAIRS<S> && !needs.own) continue;
    float* to = &space.x[b * ldx];
    for (int64_t i = 0; i < job.i; ++i) to[i] = one(x[b] + i);
    std::fill_n(to + job.i, PAD, 0.f);
  }
  if (needs.in) into_basis<T>(job, x, live, space);
  for (int64_t b = 0; b < live; ++b)
    if (const int64_t row = job.rows[first + b]; row >= 0 && job.ki && job.ko)
      apply_cores(job, &space.t[b * job.w], &space.s[b * job.m * job.ko], job.cores + row * job.ldc);
  const S* U = job.U;
  for (int64_t p = 0; p < job.m; ++p) {
    const int64_t at = job.spans[p].at, size = job.spans[p].size;
    S* to[T];
    for (int64_t b = 0; b < live; ++b) to[b] = y[b] + at;
    if (needs.own) {
      space.sum.assign((live + SPARE) * (size + PAD), 0);
      own_part(job, first, live, p, space);
    }
    const float* sum = needs.own ? space.sum.data() : nullptr;
    if (needs.out) out_of_basis<T>(job, U, p, to, live, sum, space);
    else if (sum)
      for (int64_t b = 0; b < live; ++b) plus(sum + b * (size + PAD), size, to[b]);
    U += up_to(size, LANES) * panel<S>(job.ko);
  }
}

// A tile of few tokens has fewer rows and wider panels: the basis is then read in longer runs.
template <class S>
void tile_of(const Job<S>& job, int64_t first, Space& space) {
  const int64_t live = std::min(TILE, job.n - first);
  if (live == 1) tile<1>(job, first, live, space);
  else if (live == 2) tile<2>(job, first, live, space);
  else if (live <= 4) tile<4>(job, first, live, space);
  else tile<TILE>(job, first, live, space);
}

using Given = std::optional<at::Tensor>;

template <class S>
void run(Job<S>& job, const at::Tensor& x, at::Tensor& y, const at::Tensor& V, const at::Tensor& U,
         const at::Tensor& cores, int64_t offset) {
  job.x = x.const_data_ptr<S>(), job.y = y.mutable_data_ptr<S>();
  job.V = V.const_data_ptr<S>(), job.U = U.const_data_ptr<S>();
  job.cores = cores.const_data_ptr<S>() + offset;
  const int64_t tiles = (job.n + TILE - 1) / TILE;
  at::parallel_for(0, tiles, GRAIN, [&](int64_t begin, int64_t end) {
    Space space;
    for (int64_t number = begin; number < end; ++number) tile_of(job, number * TILE, space);
  });
}

template <class S>
Job<S> job_of(const at::Tensor& x, at::Tensor& y, const at::Tensor& cores, const at::Tensor& spans,
              const at::Tensor& rows, at::IntArrayRef k) {
  Job<S> job = {};
  job.spans = reinterpret_cast<const Span*>(spans.const_data_ptr<int64_t>()), job.rows = rows.const_data_ptr<int64_t>();
  job.n = rows.size(0), job.i = x.size(1), job.m = spans.size(0), job.ko = k[0], job.ki = k[1];
  job.w = up_to(job.m * job.ki, LANES) * LANES;
  job.ldx = x.stride(0), job.ldy = y.stride(0), job.ldc = cores.stride(0);
  return job;
}

void apply(const at::Tensor& x, at::Tensor y, const at::Tensor& V, const at::Tensor& U, const at::Tensor& cores,
           const at::Tensor& spans, const at::Tensor& rows, const Given& tokens, const Given& users,
           const Given& data, const Given& starts, at::IntArrayRef k, int64_t offset) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.stride(1) == 1 && y.stride(1) == 1, "rows must be contiguous");
  TORCH_CHECK(spans.size(1) == sizeof(Span) / sizeof(int64_t) && spans.is_contiguous(), "spans: rows of 5 numbers");
  TORCH_CHECK(tokens ? tokens->size(0) == rows.size(0) : rows.size(0) <= x.size(0), "more rows than tokens");
  TORCH_CHECK(!users || (users->size(0) == rows.size(0) && data && starts), "a user a token, and their records");
  TORCH_CHECK(x.scalar_type() == y.scalar_type() && V.scalar_type() == x.scalar_type() &&
              cores.scalar_type() == x.scalar_type(), "x, y and the tables must have one type");
  const auto go = [&](auto job) {
    job.tokens = tokens ? tokens->const_data_ptr<int64_t>() : nullptr;
    if (users) {
      job.users = users->const_data_ptr<int64_t>(), job.starts = starts->const_data_ptr<int64_t>();
      job.data = reinterpret_cast<const uint32_t*>(data->const_data_ptr<int32_t>());
    }
    run(job, x, y, V, U, cores, offset);
  };
  if (x.scalar_type() == at::kFloat) go(job_of<float>(x, y, cores, spans, rows, k));
  else if (x.scalar_type() == at::kBFloat16) go(job_of<at::BFloat16>(x, y, cores, spans, rows, k));
  else TORCH_CHECK(false, "float32 and bfloat16 only, got ", x.scalar_type());
}

}  // namespace

TORCH_LIBRARY(soppu_native, library) {
  library.def(
      "apply(Tensor x, Tensor(a!) y, Tensor V, Tensor U, Tensor cores, Tensor spans, Tensor rows,"
      " Tensor? tokens, Tensor? users, Tensor? data, Tensor? starts, int[] k, int offset) -> ()",
      {at::Tag::pt2_compliant_tag});
  library.impl("apply", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(apply)));
}
