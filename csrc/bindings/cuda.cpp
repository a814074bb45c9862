// sid_kernels._cuda: the CUDA kernels, as functions of addresses, sizes and strides. See arguments.h for the tuples.
// The caller has made `device` current. A launch that fails raises RuntimeError with the message of CUDA.
#include "arguments.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace {

void raise_if(const char* error) {
  if (error) throw std::runtime_error(std::string("sid_kernels CUDA kernel: ") + error);
}

void local_loss(int64_t rows, int64_t classes, const py::tuple& logits, const py::tuple& prior, const py::tuple& spec,
                const py::tuple& outputs, uintptr_t workspace, uintptr_t stream, int device) {
  const sid::LocalLossProblem problem = sid::local_loss_problem(rows, classes, logits, prior, spec, outputs);
  if (!workspace) throw std::invalid_argument("sid_kernels: null pointer for the workspace");
  raise_if(sid::local_loss_cuda(problem, sid::pointer<void>(workspace), sid::pointer<void>(stream), device));
}

// out = in * scale. scale_stride 0: one scale for all rows, 1: one for each.
void scale(int64_t rows, int64_t classes, const py::tuple& in, const py::tuple& out, uintptr_t factors,
           int64_t scale_stride, uintptr_t stream, int device) {
  sid::Scale problem;
  problem.rows = rows;
  problem.classes = classes;
  problem.in = sid::rows_to_read(in);
  problem.out = sid::rows_to_write(out);
  problem.scale = sid::pointer<const float>(factors);
  problem.scale_stride = scale_stride;
  if (rows > 0 && (!problem.in.data || !problem.out.data || !problem.scale))
    throw std::invalid_argument("sid_kernels: null pointer for a gradient or its scale (is this a real tensor?)");
  raise_if(sid::scale_cuda(problem, sid::pointer<void>(stream), device));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("interface") = sid::kInterface;
  m.def("workspace_bytes", &sid::workspace_bytes);
  m.def("local_loss", &local_loss);
  m.def("scale", &scale);
}
