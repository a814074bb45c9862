// The one signature both bindings have, and what it means. Pointers arrive as integers, because nothing
// here may depend on PyTorch's ABI; a null pointer where memory must be is refused.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "local_loss.h"

namespace sid {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

struct Matrix {  // (address, row stride in elements, dtype), in Python a tuple
  uintptr_t address;
  int64_t stride;
  int dtype;
};

inline Matrix matrix(const pybind11::tuple& t) {
  return {t[0].cast<uintptr_t>(), t[1].cast<int64_t>(), t[2].cast<int>()};
}

inline LocalLossProblem local_loss_arguments(int64_t rows, int64_t classes, const pybind11::tuple& logits,
                                             const pybind11::tuple& prior, uintptr_t labels,
                                             const pybind11::tuple& soft, uintptr_t alpha, int64_t alpha_stride,
                                             float alpha_value, float label_smoothing, int64_t ignore_index,
                                             bool reverse, int reduction, const pybind11::tuple& belief,
                                             const pybind11::tuple& dlogits, uintptr_t loss, uintptr_t fidelity,
                                             uintptr_t consistency) {
  auto in = [](const pybind11::tuple& t) {
    const Matrix m = matrix(t);
    return Rows{pointer<const void>(m.address), m.stride, static_cast<DType>(m.dtype)};
  };
  auto out = [](const pybind11::tuple& t) {
    const Matrix m = matrix(t);
    return MutableRows{pointer<void>(m.address), m.stride, static_cast<DType>(m.dtype)};
  };
  LocalLossProblem a;
  a.rows = rows;
  a.classes = classes;
  a.logits = in(logits);
  a.prior = in(prior);
  a.labels = pointer<const int64_t>(labels);
  a.soft = in(soft);
  a.alpha = pointer<const float>(alpha);
  a.alpha_stride = alpha_stride;
  a.alpha_value = alpha_value;
  a.label_smoothing = label_smoothing;
  a.ignore_index = ignore_index;
  a.reverse = reverse;
  a.reduction = static_cast<Reduction>(reduction);
  a.belief = out(belief);
  a.dlogits = out(dlogits);
  a.loss = pointer<float>(loss);
  a.fidelity = pointer<float>(fidelity);
  a.consistency = pointer<float>(consistency);
  const bool each = a.reduction == Reduction::none;
  const bool losses = a.loss && a.fidelity && a.consistency;
  if ((rows > 0 && (!a.logits.data || (!a.labels && !a.soft.data))) || (!losses && !(each && rows == 0)))
    throw std::invalid_argument("sid_kernels: null pointer for logits, target or a loss (is this a real tensor?)");
  return a;
}

}  // namespace sid
