// How rows are stored: packs of 16 bytes of float, bfloat16 or float16, or single elements whose dtype is known only at
// run time (Any). Loads return float, and stores convert from float.
#pragma once
#include "device.cuh"
#include "local_loss.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstring>

namespace sid {
namespace device {

template <class To, class From> SID_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(to));
  return to;
}

SID_DEVICE float widen(float x) { return x; }
SID_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
SID_DEVICE float widen(__half x) { return __half2float(x); }
SID_DEVICE void narrow(float x, float* to) { *to = x; }
SID_DEVICE void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
SID_DEVICE void narrow(float x, __half* to) { *to = __float2half_rn(x); }

// Two adjacent elements in a 32-bit word. The element with the lower address is in the low half.
template <class T> struct Pair;
template <> struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static SID_DEVICE float get(unsigned word, bool high) {
    return bits_as<float>(high ? word & 0xffff0000u : word << 16);
  }
  static SID_DEVICE unsigned set(float low, float high) { return bits_as<unsigned>(__floats2bfloat162_rn(low, high)); }
};
template <> struct Pair<__half> {
  using Type = __half2;
  static SID_DEVICE float get(unsigned word, bool high) {
    const __half2 pair = bits_as<__half2>(word);
    return high ? __high2float(pair) : __low2float(pair);
  }
  static SID_DEVICE unsigned set(float low, float high) { return bits_as<unsigned>(__floats2half2_rn(low, high)); }
};

SID_DEVICE __nv_bfloat162 greater(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
SID_DEVICE __half2 greater(__half2 a, __half2 b) { return __hmax2(a, b); }

// V elements as stored in memory: 16 bytes.
template <class T> struct Pack {
  static constexpr int V = 8;
  unsigned word[4];
  SID_DEVICE float get(int i) const { return Pair<T>::get(word[i / 2], i % 2); }
  SID_DEVICE void set(int i, float low, float high) { word[i / 2] = Pair<T>::set(low, high); }
  SID_DEVICE void zero() { word[0] = word[1] = word[2] = word[3] = 0; }
  SID_DEVICE float max() const {  // ignores NaN
    using Type = typename Pair<T>::Type;
    const Type a = greater(bits_as<Type>(word[0]), bits_as<Type>(word[1]));
    const Type b = greater(bits_as<Type>(word[2]), bits_as<Type>(word[3]));
    const unsigned both = bits_as<unsigned>(greater(a, b));
    return fmaxf(Pair<T>::get(both, false), Pair<T>::get(both, true));
  }
};
template <> struct Pack<float> {
  static constexpr int V = 4;
  unsigned word[4];
  SID_DEVICE float get(int i) const { return bits_as<float>(word[i]); }
  SID_DEVICE void set(int i, float low, float high) {
    word[i] = bits_as<unsigned>(low), word[i + 1] = bits_as<unsigned>(high);
  }
  SID_DEVICE void zero() { word[0] = word[1] = word[2] = word[3] = 0; }
  SID_DEVICE float max() const { return fmaxf(fmaxf(get(0), get(1)), fmaxf(get(2), get(3))); }
};
struct Any {};  // a dtype known only at run time
template <> struct Pack<Any> {
  static constexpr int V = 1;
  float value;
  SID_DEVICE float get(int) const { return value; }
  SID_DEVICE void set(int, float x, float) { value = x; }
  SID_DEVICE void zero() { value = 0.0f; }
  SID_DEVICE float max() const { return value; }
};

SID_DEVICE float load_as(DType dtype, const void* p, int i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  if (dtype == DType::bf16) return widen(static_cast<const __nv_bfloat16*>(p)[i]);
  return widen(static_cast<const __half*>(p)[i]);
}
SID_DEVICE void store_as(DType dtype, void* p, int i, float x) {
  if (dtype == DType::f32) return narrow(x, static_cast<float*>(p) + i);
  if (dtype == DType::bf16) return narrow(x, static_cast<__nv_bfloat16*>(p) + i);
  narrow(x, static_cast<__half*>(p) + i);
}

// Load U elements, starting at element i.
template <int U, class T> SID_DEVICE void load_some(const void* p, int i, float (&x)[U]) {
#pragma unroll
  for (int j = 0; j < U; ++j) x[j] = widen(static_cast<const T*>(p)[i + j]);
}
template <int U> SID_DEVICE void load_some(DType dtype, const void* p, int i, float (&x)[U]) {
  if (dtype == DType::f32) return load_some<U, float>(p, i, x);
  if (dtype == DType::bf16) return load_some<U, __nv_bfloat16>(p, i, x);
  load_some<U, __half>(p, i, x);
}

// A row (C elements) of a matrix of type T.
template <class T> struct Row {
  T* data;
  SID_DEVICE Row(const void* matrix, int64_t stride, DType, int64_t row)
      : data(static_cast<T*>(const_cast<void*>(matrix)) + row * stride) {}
  SID_DEVICE float load(int i) const { return widen(data[i]); }
  SID_DEVICE void store(int i, float x) const { narrow(x, data + i); }
  SID_DEVICE void store(int i, const Pack<T>& pack) const {
    store16(data + i, {pack.word[0], pack.word[1], pack.word[2], pack.word[3]});
  }
  // Load packs[k] from element first + k * step, if that is below `end`.
  template <int K> SID_DEVICE void load(Pack<T> (&packs)[K], int first, int step, int end) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (first + k * step < end) {
        const uint4 raw = load16(data + first + k * step);
        packs[k].word[0] = raw.x, packs[k].word[1] = raw.y, packs[k].word[2] = raw.z, packs[k].word[3] = raw.w;
      }
  }
};
template <> struct Row<Any> {
  char* data;
  DType dtype;
  SID_DEVICE Row(const void* matrix, int64_t stride, DType type, int64_t row)
      : data(static_cast<char*>(const_cast<void*>(matrix)) + row * stride * (type == DType::f32 ? 4 : 2)),
        dtype(type) {}
  SID_DEVICE float load(int i) const { return load_as(dtype, data, i); }
  SID_DEVICE void store(int i, float x) const { store_as(dtype, data, i, x); }
  SID_DEVICE void store(int i, const Pack<Any>& pack) const { store(i, pack.value); }
  template <class T, int K> SID_DEVICE void load_typed(Pack<Any> (&packs)[K], int first, int step, int end) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (first + k * step < end) packs[k].value = widen(reinterpret_cast<const T*>(data)[first + k * step]);
  }
  template <int K> SID_DEVICE void load(Pack<Any> (&packs)[K], int first, int step, int end) const {
    if (dtype == DType::f32) return load_typed<float>(packs, first, step, end);
    if (dtype == DType::bf16) return load_typed<__nv_bfloat16>(packs, first, step, end);
    load_typed<__half>(packs, first, step, end);
  }
};

}  // namespace device
}  // namespace sid
