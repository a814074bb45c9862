// sid_kernels._C: the CPU kernels. Torch-free: addresses, sizes and strides come as integers.
#include "arguments.h"
#include "cpu/local_loss.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("instruction_set", &sid::cpu_instruction_set);
  // -> None, or (row, label) of the first label out of range; then nothing was written.
  m.def("local_loss", [](int64_t rows, int64_t classes, const py::tuple& logits, const py::tuple& prior, uintptr_t labels,
                         const py::tuple& soft, uintptr_t alpha, int64_t alpha_stride, float alpha_value, float label_smoothing,
                         int64_t ignore_index, bool reverse, int reduction, const py::tuple& belief, const py::tuple& dlogits,
                         uintptr_t loss, uintptr_t fidelity, uintptr_t consistency, int threads) -> py::object {
    const sid::LocalLoss args =
        sid::local_loss_arguments(rows, classes, logits, prior, labels, soft, alpha, alpha_stride, alpha_value, label_smoothing,
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
}
