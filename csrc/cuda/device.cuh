// The device layer: thread indices, shuffles, barriers, shared memory, clusters, atomics, fast exp2 and log2, 16-byte
// accesses, and the launch. This is the only file that knows CUDA. With SID_SIMT defined, a host implementation
// replaces it, and the tests run the same kernels on a CPU.
#pragma once
#include <cstdint>

#if defined(SID_SIMT)
#include "simt_device.h"
#else
#include <cuda_runtime.h>

#define SID_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define SID_DEVICE __device__ __forceinline__

namespace sid {
namespace device {

// ---- indices: grids and blocks are one-dimensional -------------------------------------------------
SID_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
SID_DEVICE int threads() { return static_cast<int>(blockDim.x); }
SID_DEVICE int block() { return static_cast<int>(blockIdx.x); }
SID_DEVICE int blocks() { return static_cast<int>(gridDim.x); }

// ---- warp ------------------------------------------------------------------------------------------
template <class T> SID_DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
SID_DEVICE void sync_warp() { __syncwarp(); }

// ---- block, and cluster of blocks (from sm_90 on; on older GPUs a cluster is one block) ------------
SID_DEVICE void sync_block() { __syncthreads(); }
SID_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
SID_DEVICE int cluster_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
SID_DEVICE int cluster_size() { return static_cast<int>(__clusterSizeInBlocks()); }
SID_DEVICE void sync_cluster() {  // makes earlier writes to other blocks' shared memory visible
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
// Return the address of the same shared variable in block `rank` of the cluster.
template <class T> SID_DEVICE T* in_block(T* shared, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
}
#else
SID_DEVICE int cluster_rank() { return 0; }
SID_DEVICE int cluster_size() { return 1; }
SID_DEVICE void sync_cluster() { __syncthreads(); }
template <class T> SID_DEVICE T* in_block(T* shared, int) { return shared; }
#endif

// ---- memory ----------------------------------------------------------------------------------------
// Loads are coherent, because dlogits may overwrite the logits.
SID_DEVICE uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
SID_DEVICE void store16(void* p, uint4 x) { __stcs(static_cast<uint4*>(p), x); }  // streaming: no kernel reads it again
template <class T> SID_DEVICE T load_shared_by_blocks(const T* p) { return __ldcg(p); }  // bypasses the L1 cache
SID_DEVICE unsigned atomic_add(unsigned* p, unsigned x) { return atomicAdd(p, x); }
SID_DEVICE void fence() { __threadfence(); }

// Return x, but hide from the compiler that it is x. Values that depend on it are then recomputed where they are
// used instead of being kept in registers.
SID_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- arithmetic ------------------------------------------------------------------------------------
SID_DEVICE float max_or_nan(float x, float y) {  // NaN if either is NaN
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
SID_DEVICE float fast_exp2(float x) {  // within 2 ulp; subnormal results become 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// For normal x, the error is below 2^-22: absolute for x in [1/2, 2], relative elsewhere.
SID_DEVICE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- host -------------------------------------------------------------------------------------------
// Properties of a device.
struct DeviceProperties {
  int multiprocessors = 0;
  bool clusters = false;
};
// Read the properties of a device, once per process. Return null, or an error message.
inline const char* device_properties(int device, DeviceProperties* out) {
  constexpr int kDevices = 64;
  static DeviceProperties properties[kDevices];  // two threads may write an entry at once, with the same values
  if (device < 0 || device >= kDevices) return "device index out of range";
  if (properties[device].multiprocessors == 0) {
    int count = 0, major = 0;
    cudaError_t e = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (e != cudaSuccess) return cudaGetLastError(), cudaGetErrorString(e);
    properties[device].clusters = major >= 9;
    properties[device].multiprocessors = count;
  }
  *out = properties[device];
  return nullptr;
}

// The size of a launch: blocks in the grid, threads per block, blocks per cluster.
struct Grid {
  int blocks, threads, cluster;
  size_t shared;  // bytes of shared memory per block
};
// Launch a kernel with one argument on `stream`. Return null, or an error message.
template <class Job> const char* launch(void (*kernel)(Job), const Grid& grid, void* stream, const Job& job) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, job), last = cudaGetLastError();
  if (launched != cudaSuccess) return cudaGetErrorString(launched);
  return last != cudaSuccess ? cudaGetErrorString(last) : nullptr;
}

}  // namespace device
}  // namespace sid
#endif
