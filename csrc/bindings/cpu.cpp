// sid_kernels._C: the CPU kernels. Torch-free: addresses, sizes and strides come as integers.
#include "arguments.h"
#include "cpu/cascade.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("instruction_set", &sid::cpu_instruction_set);
  // -> None, or (row, label) of the first label out of range; then nothing was written.
  m.def("local_loss",
        [](int64_t rows, int64_t classes, const py::tuple& logits, const py::tuple& prior, uintptr_t labels,
           const py::tuple& soft, uintptr_t alpha, int64_t alpha_stride, float alpha_value, float label_smoothing,
           int64_t ignore_index, bool reverse, int reduction, const py::tuple& belief, const py::tuple& dlogits,
           uintptr_t loss, uintptr_t fidelity, uintptr_t consistency, int threads) -> py::object {
          const sid::LocalLossProblem args = sid::local_loss_arguments(
              rows, classes, logits, prior, labels, soft, alpha, alpha_stride, alpha_value, label_smoothing,
              ignore_index, reverse, reduction, belief, dlogits, loss, fidelity, consistency);
          sid::BadLabel bad;
          if (rows * classes < 65536) {
            bad = sid::local_loss_cpu(args, threads);  // shorter than handing the interpreter over
          } else {
            py::gil_scoped_release release;
            bad = sid::local_loss_cpu(args, threads);
          }
          if (bad.row < 0) return py::none();
          return py::make_tuple(bad.row, bad.label);
        });
  // -> as above. Addresses of float32 arrays, shaped as csrc/cascade.h says; labels int64.
  m.def("cascade",
        [](int64_t stages, int64_t rows, int64_t classes, int64_t hidden_dim, uintptr_t hidden_weight,
           int64_t hidden_weight_stride, uintptr_t hidden_bias, uintptr_t logits_weight, uintptr_t logits_bias,
           const py::tuple& prior, uintptr_t labels, const py::tuple& soft, uintptr_t alpha, float alpha_value,
           float label_smoothing, int64_t ignore_index, bool reverse, bool mean, uintptr_t hidden, uintptr_t dhidden,
           uintptr_t beliefs, uintptr_t dlogits, uintptr_t logits, uintptr_t losses, uintptr_t hidden_bias_gradient,
           uintptr_t logits_bias_gradient, int threads) -> py::object {
          using sid::pointer;
          auto in = [](const py::tuple& t) {
            const sid::Matrix x = sid::matrix(t);
            return sid::Rows{pointer<const void>(x.address), x.stride, static_cast<sid::DType>(x.dtype)};
          };
          sid::CascadeProblem a;
          a.stages = stages, a.rows = rows, a.classes = classes, a.hidden_dim = hidden_dim;
          a.hidden_weight = pointer<const float>(hidden_weight), a.hidden_weight_stride = hidden_weight_stride;
          a.hidden_bias = pointer<const float>(hidden_bias);
          a.logits_weight = pointer<const float>(logits_weight), a.logits_bias = pointer<const float>(logits_bias);
          a.prior = in(prior), a.labels = pointer<const int64_t>(labels), a.soft = in(soft);
          a.alpha = pointer<const float>(alpha), a.alpha_value = alpha_value, a.label_smoothing = label_smoothing;
          a.ignore_index = ignore_index, a.reverse = reverse, a.mean = mean;
          a.hidden_bias_gradient = pointer<float>(hidden_bias_gradient);
          a.logits_bias_gradient = pointer<float>(logits_bias_gradient);
          a.hidden = pointer<float>(hidden), a.dhidden = pointer<float>(dhidden), a.beliefs = pointer<float>(beliefs);
          a.dlogits = pointer<float>(dlogits), a.logits = pointer<float>(logits), a.losses = pointer<float>(losses);
          const bool weights = a.hidden_weight && a.hidden_bias && a.logits_weight && a.logits_bias;
          const bool gradients = !a.dhidden || (a.dlogits && a.hidden_bias_gradient && a.logits_bias_gradient);
          const bool outputs = a.hidden && a.beliefs && a.logits && a.losses && gradients;
          if (rows < 1 || (!weights || !outputs || (!a.labels && !a.soft.data)))
            throw std::invalid_argument(
                "sid_kernels: null pointer for a weight, the target or an output (is this a real tensor?), or no rows");
          sid::BadLabel bad;
          {
            py::gil_scoped_release release;
            bad = sid::cascade_cpu(a, threads);
          }
          if (bad.row < 0) return py::none();
          return py::make_tuple(bad.row, bad.label);
        });
}
