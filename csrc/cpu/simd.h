// SIMD vectors of floats, as wide as the instruction set of this translation unit allows: exp_ and log_, and loads
// and stores of full and partial vectors in the three storage types.
// Arithmetic uses the vector extensions of GCC and Clang, so row_math.h compiles for Vec as it does for float.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "local_loss.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SID_WIDTH 16
#elif defined(__AVX2__)
#define SID_WIDTH 8
#else
#define SID_WIDTH 4
#endif

namespace sid {
namespace {  // internal linkage: each instruction set has its own copy

constexpr int kWidth = SID_WIDTH;
typedef float Vec __attribute__((vector_size(SID_WIDTH * 4)));
typedef int32_t VecI __attribute__((vector_size(SID_WIDTH * 4)));
typedef uint32_t VecU __attribute__((vector_size(SID_WIDTH * 4)));
typedef uint16_t VecH __attribute__((vector_size(SID_WIDTH * 2)));

template <class To, class From> inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline Vec broadcast(float x) { return Vec{} + x; }
inline VecI lanes() {  // 0, 1, 2, ...
  VecI v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

// ---- mathematics ---------------------------------------------------------------------------------
inline float exp_(float x) { return std::exp(x); }
inline float log_(float x) { return std::log(x); }

// exp(x) for x <= 0 is 2^n 2^f with n = round(x log2 e) and |f| <= 1/2. NaN passes through.
// 2^f is a minimax polynomial with relative error 9e-8, exact at 0. The absolute error of exp is below 1e-7. Its
// relative error grows with |x|, as does the effect of rounding the argument.
inline Vec exp2_fraction(Vec f) {
  Vec p = broadcast(1.340725852e-3f);
  p = p * f + 9.671875100e-3f;
  p = p * f + 5.550308364e-2f;
  p = p * f + 2.402223462e-1f;
  p = p * f + 6.931472149e-1f;
  return p * f + 1.0f;
}
// log(x) for a normal x > 0 is e ln 2 + log(m) with x = 2^e m and 1 <= m < 2. NaN passes through.
// log(m) is a minimax polynomial with absolute error 3e-8, exact at 1.
inline Vec log_of(Vec exponent, Vec mantissa) {
  const Vec f = mantissa - 1.0f;
  Vec p = broadcast(-6.452604162e-3f);
  p = p * f + 3.608448581e-2f;
  p = p * f - 9.532243493e-2f;
  p = p * f + 1.676478060e-1f;
  p = p * f - 2.407307312e-1f;
  p = p * f + 3.317982474e-1f;
  p = p * f - 4.998740440e-1f;
  p = p * f + 9.999964235e-01f;
  // ln 2 in two parts, so that the product with the larger one is exact.
  return (p * f + exponent * -2.12194440e-4f) + exponent * 0.693359375f;
}
#if defined(__AVX512F__)
inline Vec exp_(Vec x) {
  // maxps returns its second argument if either is NaN. Subnormal results become 0: arithmetic with them is about a
  // hundred times slower, and a sharp distribution has many.
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)(x * 1.44269504088896341f));
  const __mmask16 normal = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)exp2_fraction((Vec)y - (Vec)n), n);
}
inline Vec log_(Vec x) {
  return log_of((Vec)_mm512_getexp_ps((__m512)x),
                (Vec)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src));
}
#else
inline Vec exp_(Vec x) {
  // Adding 1.5 * 2^23 + 127 rounds to an integer in the low bits: n and the bias of an exponent.
  const Vec magic = broadcast(12583039.0f);
  const Vec y = x * 1.44269504088896341f;
  const Vec k = y + magic;
  const Vec value = exp2_fraction(y - (k - magic)) * bits_as<Vec>(bits_as<VecI>(k) << 23);
  return y < broadcast(-126.0f) ? broadcast(0.0f) : value;
}
inline Vec log_(Vec x) {
  const VecI bits = bits_as<VecI>(x);
  const Vec exponent = __builtin_convertvector((bits >> 23) - 127, Vec);
  return log_of(exponent, bits_as<Vec>((bits & 0x7fffff) | 0x3f800000)) + (x - x);
}
#endif

// Return the larger of a and b, or a if b is NaN. (A NaN in a row reaches the result through the sums.)
template <class V> inline V larger(V a, V b) { return b > a ? b : a; }
#if defined(__AVX512F__)
// A single instruction. For the expression above the compiler uses two.
inline Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)b, (__m512)a); }
#endif

// Reduce the lanes of a vector pairwise, halving it each time.
typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
template <class Half, class Whole, class Join> inline Half halve(Whole x, Join join) {
  Half half[2];
  static_assert(sizeof half == sizeof x, "");
  std::memcpy(half, &x, sizeof x);
  return join(half[0], half[1]);
}
template <class Join> inline float fold(Vec x, Join join) {
#if SID_WIDTH == 16
  const Vec4 v = halve<Vec4>(halve<Vec8>(x, join), join);
#elif SID_WIDTH == 8
  const Vec4 v = halve<Vec4>(x, join);
#else
  const Vec4 v = x;
#endif
  return join(join(v[0], v[1]), join(v[2], v[3]));
}
inline float sum_lanes(Vec x) {
  return fold(x, [](auto a, auto b) { return a + b; });
}
inline float max_lanes(Vec x) {
  return fold(x, [](auto a, auto b) { return larger(a, b); });
}

// ---- float32 memory ------------------------------------------------------------------------------
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX512F__)
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec load_first(const float* p, int n, float fill) {
  return (Vec)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p);
}
inline void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
#elif defined(__AVX2__)
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_first(const float* p, int n, float fill) {
  const __m256i mask = first(n);
  return (Vec)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
inline void store_first(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first(n), (__m256)v); }
#else
inline Vec load_first(const float* p, int n, float fill) {
  Vec v = broadcast(fill);
  std::memcpy(&v, p, sizeof(float) * n);
  return v;
}
inline void store_first(float* p, Vec v, int n) { std::memcpy(p, &v, sizeof(float) * n); }
#endif

// Store a vector without reading or keeping its cache line. `p` must be aligned to the vector.
inline void stream(void* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#else
  std::memcpy(p, &v, sizeof v);
#endif
}
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- bfloat16 and float16 ------------------------------------------------------------------------
inline Vec widen_bf16(VecH h) { return bits_as<Vec>(__builtin_convertvector(h, VecU) << 16); }
inline VecH narrow_bf16(Vec v) {  // rounds to nearest even; NaN becomes a quiet NaN
  const VecU bits = bits_as<VecU>(v);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU quiet = VecU{} + 0x7fc0u;
  return __builtin_convertvector(v != v ? quiet : rounded, VecH);
}

inline float widen_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The bits of a half, read as a float, are 2^-112 times its value. This holds for subnormal halves too.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 5.192296858534828e33f));
}
inline uint16_t narrow_f16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const float a = std::fabs(x);
  if (!(a < 65520.0f)) return static_cast<uint16_t>(sign | (x != x ? 0x7e00u : 0x7c00u));
  if (a < 6.103515625e-05f)  // subnormal: adding 0.5 rounds to multiples of 2^-24, as a half does
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(a + 0.5f) - 0x3f000000u));
  const uint32_t m = bits & 0x7fffffffu;
  return static_cast<uint16_t>(sign | ((m - 0x38000000u + 0xfffu + (m >> 13 & 1u)) >> 13));
}
#if defined(__AVX512F__)
inline Vec widen_f16(VecH h) { return (Vec)_mm512_cvtph_ps(bits_as<__m256i>(h)); }
inline VecH narrow_f16(Vec v) { return bits_as<VecH>(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__) && defined(__F16C__)
inline Vec widen_f16(VecH h) { return (Vec)_mm256_cvtph_ps(bits_as<__m128i>(h)); }
inline VecH narrow_f16(Vec v) { return bits_as<VecH>(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline Vec widen_f16(VecH h) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = widen_f16(h[i]);
  return v;
}
inline VecH narrow_f16(Vec v) {
  VecH h;
  for (int i = 0; i < kWidth; ++i) h[i] = narrow_f16(v[i]);
  return h;
}
#endif

template <bool BF16> inline void widen_row(const uint16_t* from, float* to, int64_t n) {
  VecH h;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    std::memcpy(&h, from + i, sizeof h);
    store(to + i, BF16 ? widen_bf16(h) : widen_f16(h));
  }
  if (i < n) {
    h = VecH{};
    std::memcpy(&h, from + i, sizeof(uint16_t) * (n - i));
    store_first(to + i, BF16 ? widen_bf16(h) : widen_f16(h), static_cast<int>(n - i));
  }
}
template <bool BF16> inline void narrow_row(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const VecH h = BF16 ? narrow_bf16(load(from + i)) : narrow_f16(load(from + i));
    std::memcpy(to + i, &h, sizeof h);
  }
  if (i < n) {
    const Vec v = load_first(from + i, static_cast<int>(n - i), 0.0f);
    const VecH h = BF16 ? narrow_bf16(v) : narrow_f16(v);
    std::memcpy(to + i, &h, sizeof(uint16_t) * (n - i));
  }
}

}  // namespace
}  // namespace sid
