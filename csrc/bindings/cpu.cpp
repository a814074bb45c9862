// sid_kernels._C: the CPU kernels, as functions of addresses, sizes and strides. See arguments.h for the tuples.
#include "arguments.h"
#include "cpu/cascade.h"

namespace py = pybind11;

namespace {

// Below this number of elements, a call takes less time than releasing the interpreter lock.
constexpr int64_t kReleaseElements = 65536;

// Return None, or (row, label) of the first label out of range; then the kernel has written nothing.
py::object label_result(const sid::BadLabel& bad) {
  if (bad.row < 0) return py::none();
  return py::make_tuple(bad.row, bad.label);
}

py::object local_loss(int64_t rows, int64_t classes, const py::tuple& logits, const py::tuple& prior,
                      const py::tuple& spec, const py::tuple& outputs, int threads) {
  const sid::LocalLossProblem problem = sid::local_loss_problem(rows, classes, logits, prior, spec, outputs);
  if (rows * classes < kReleaseElements) return label_result(sid::local_loss_cpu(problem, threads));
  sid::BadLabel bad;
  {
    py::gil_scoped_release release;
    bad = sid::local_loss_cpu(problem, threads);
  }
  return label_result(bad);
}

// sizes: (L, B, C, H). weights: (hidden_weight, its row stride, hidden_bias, logits_weight, logits_bias).
// outputs: (losses, beliefs, logits). gradients: (dlogits, dhidden, hidden_bias, logits_bias), all 0 to compute none.
py::object cascade(const py::tuple& sizes, const py::tuple& weights, const py::tuple& prior, const py::tuple& spec,
                   uintptr_t hidden, const py::tuple& outputs, const py::tuple& gradients, int threads) {
  using sid::item;
  using sid::pointer;
  sid::CascadeProblem problem;
  problem.stages = item<int64_t>(sizes, 0);
  problem.rows = item<int64_t>(sizes, 1);
  problem.classes = item<int64_t>(sizes, 2);
  problem.hidden_dim = item<int64_t>(sizes, 3);
  problem.hidden_weight = pointer<const float>(weights, 0);
  problem.hidden_weight_stride = item<int64_t>(weights, 1);
  problem.hidden_bias = pointer<const float>(weights, 2);
  problem.logits_weight = pointer<const float>(weights, 3);
  problem.logits_bias = pointer<const float>(weights, 4);
  problem.prior = sid::rows_to_read(prior);
  problem.spec = sid::loss_spec(spec);
  problem.hidden = pointer<float>(hidden);
  problem.losses = pointer<float>(outputs, 0);
  problem.beliefs = pointer<float>(outputs, 1);
  problem.logits = pointer<float>(outputs, 2);
  problem.dlogits = pointer<float>(gradients, 0);
  problem.dhidden = pointer<float>(gradients, 1);
  problem.hidden_bias_gradient = pointer<float>(gradients, 2);
  problem.logits_bias_gradient = pointer<float>(gradients, 3);
  const bool inputs = problem.hidden_weight && problem.hidden_bias && problem.logits_weight && problem.logits_bias &&
                      (problem.spec.labels || problem.spec.soft.data);
  const bool results = problem.hidden && problem.losses && problem.beliefs && problem.logits;
  const bool derivatives =
      !problem.dhidden || (problem.dlogits && problem.hidden_bias_gradient && problem.logits_bias_gradient);
  if (problem.rows < 1 || !inputs || !results || !derivatives)
    throw std::invalid_argument(
        "sid_kernels: null pointer for a weight, the target or an output (is this a real tensor?), or no rows");
  sid::BadLabel bad;
  {
    py::gil_scoped_release release;
    bad = sid::cascade_cpu(problem, threads);
  }
  return label_result(bad);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("interface") = sid::kInterface;
  m.def("instruction_set", &sid::cpu_instruction_set);
  m.def("local_loss", &local_loss);
  m.def("cascade", &cascade);
}
