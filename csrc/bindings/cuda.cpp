// sid_kernels._cuda: the CUDA kernels. Torch-free: addresses, sizes, strides, the stream and the device come as
// integers. The caller has made `device` current; a failed launch is a RuntimeError with CUDA's own words.
#include "arguments.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace {
void raise_if(const char* error) {
  if (error) throw std::runtime_error(std::string("sid_kernels CUDA kernel: ") + error);
}
}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("workspace_bytes", &sid::workspace_bytes);
  m.def("local_loss", [](int64_t rows, int64_t classes, const py::tuple& logits, const py::tuple& prior,
                         uintptr_t labels, const py::tuple& soft, uintptr_t alpha, int64_t alpha_stride,
                         float alpha_value, float label_smoothing, int64_t ignore_index, bool reverse, int reduction,
                         const py::tuple& belief, const py::tuple& dlogits, uintptr_t loss, uintptr_t fidelity,
                         uintptr_t consistency, uintptr_t workspace, uintptr_t stream, int device) {
    const sid::LocalLossProblem args = sid::local_loss_arguments(
        rows, classes, logits, prior, labels, soft, alpha, alpha_stride, alpha_value, label_smoothing, ignore_index,
        reverse, reduction, belief, dlogits, loss, fidelity, consistency);
    if (!workspace) throw std::invalid_argument("sid_kernels: null pointer for the workspace");
    raise_if(sid::local_loss_cuda(args, sid::pointer<void>(workspace), sid::pointer<void>(stream), device));
  });
  // out = in * scale; scale_stride 0: one scale, 1: one a row.
  m.def("scale", [](int64_t rows, int64_t classes, const py::tuple& in, const py::tuple& out, uintptr_t scale,
                    int64_t scale_stride, uintptr_t stream, int device) {
    const sid::Matrix from = sid::matrix(in), to = sid::matrix(out);
    if (rows > 0 && (!from.address || !to.address || !scale))
      throw std::invalid_argument("sid_kernels: null pointer for a gradient or its scale (is this a real tensor?)");
    sid::Scale args;
    args.rows = rows;
    args.classes = classes;
    args.in = {sid::pointer<const void>(from.address), from.stride, static_cast<sid::DType>(from.dtype)};
    args.out = {sid::pointer<void>(to.address), to.stride, static_cast<sid::DType>(to.dtype)};
    args.scale = sid::pointer<const float>(scale);
    args.scale_stride = scale_stride;
    raise_if(sid::scale_cuda(args, sid::pointer<void>(stream), device));
  });
}
