// Converts the arguments of the bindings to the structs of csrc/. sid_kernels/core/native.py makes the tuples.
// Pointers arrive as integers, so that nothing depends on the ABI of PyTorch. A missing pointer raises ValueError.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "local_loss.h"

namespace sid {

namespace py = pybind11;

// The version of the functions' arguments, which sid_kernels/core/native.py compares with its INTERFACE on import.
// Raise both if the arguments of a binding change.
constexpr int kInterface = 2;

// Return the address in an integer; 0 is null.
template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Return item i of a tuple.
template <class T> T item(const py::tuple& t, size_t i) { return t[i].cast<T>(); }
template <class T> T* pointer(const py::tuple& t, size_t i) { return pointer<T>(item<uintptr_t>(t, i)); }

// Return the matrix in a tuple (address, row stride in elements, dtype).
inline Rows rows_to_read(const py::tuple& t) {
  return {pointer<const void>(t, 0), item<int64_t>(t, 1), static_cast<DType>(item<int>(t, 2))};
}
inline MutableRows rows_to_write(const py::tuple& t) {
  return {pointer<void>(t, 0), item<int64_t>(t, 1), static_cast<DType>(item<int>(t, 2))};
}

// Return the loss spec in a tuple (labels, soft, alpha, alpha_stride, alpha_value, options).
inline LossSpec loss_spec(const py::tuple& t) {
  const auto options = item<py::tuple>(t, 5);
  return {pointer<const int64_t>(t, 0),
          rows_to_read(item<py::tuple>(t, 1)),
          pointer<const float>(t, 2),
          item<int64_t>(t, 3),
          item<float>(t, 4),
          {item<bool>(options, 0), item<float>(options, 1), item<int64_t>(options, 2),
           static_cast<Reduction>(item<int>(options, 3))}};
}

// Return the problem with the outputs (loss, belief, fidelity, consistency, dlogits), and in a backward pass a sixth
// item, the incoming gradient: (address, stride, precomputed).
inline LocalLossProblem local_loss_problem(int64_t rows, int64_t classes, const py::tuple& logits,
                                           const py::tuple& prior, const py::tuple& spec, const py::tuple& outputs) {
  LocalLossProblem problem;
  problem.rows = rows;
  problem.classes = classes;
  problem.logits = rows_to_read(logits);
  problem.prior = rows_to_read(prior);
  problem.spec = loss_spec(spec);
  problem.loss = pointer<float>(outputs, 0);
  problem.belief = rows_to_write(item<py::tuple>(outputs, 1));
  problem.fidelity = pointer<float>(outputs, 2);
  problem.consistency = pointer<float>(outputs, 3);
  problem.dlogits = rows_to_write(item<py::tuple>(outputs, 4));
  if (outputs.size() > 5) {
    const auto incoming = item<py::tuple>(outputs, 5);
    problem.incoming = pointer<const float>(incoming, 0);
    problem.incoming_stride = item<int64_t>(incoming, 1);
    problem.precomputed = item<bool>(incoming, 2);
  }
  const bool target = problem.spec.labels || problem.spec.soft.data;
  const bool losses = problem.loss && problem.fidelity && problem.consistency;
  const bool no_losses = rows == 0 && problem.spec.options.reduction == Reduction::none;
  if ((rows > 0 && (!problem.logits.data || !target)) || (!losses && !no_losses))
    throw std::invalid_argument("sid_kernels: null pointer for logits, target or a loss (is this a real tensor?)");
  return problem;
}

}  // namespace sid
