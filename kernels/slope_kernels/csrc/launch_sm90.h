// The host's side of a Hopper kernel: its parameters are made once a shape, and each call puts its addresses in.
//
// Making tensor maps takes longer than many a product; moving one to another address does not. Nothing here waits or
// takes device memory.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include <cuda.h>
#include <cuda_runtime.h>

#include "cutlass/device_kernel.h"

namespace slope {

template <class Kernel>
void const* entry_of() {
  return reinterpret_cast<void const*>(&cutlass::device_kernel<Kernel>);
}

// The parameters of a key, with the addresses of the call that first asked; null where the kernel cannot run it.
// `make` gives its arguments; `change` has the last word on what came of them.
template <class Kernel, std::size_t Words, class Make, class Change>
typename Kernel::Params const* kept_params(std::array<int64_t, Words> const& key, Make make, Change change) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, Words>, typename Kernel::Params> kept;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = kept.find(key);
  if (found == kept.end()) {
    auto arguments = make();
    auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (!Kernel::can_implement(arguments) ||
        cudaFuncSetAttribute(entry_of<Kernel>(), attribute, Kernel::SharedStorageSize)) {
      return nullptr;
    }
    auto params = Kernel::to_underlying_arguments(arguments, nullptr);
    change(params);
    found = kept.emplace(key, params).first;
  }
  return &found->second;
}

// The tensor map of a copy, moved to another address.
template <class Copy>
bool move(Copy const& copy, void const* address) {
  using Replace = CUresult (*)(CUtensorMap*, void*);
  static Replace const replace = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapReplaceAddress", &entry, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<Replace>(entry);
  }();
  auto map = const_cast<CUtensorMap*>(copy.get_tma_descriptor());
  return replace && replace(map, const_cast<void*>(address)) == CUDA_SUCCESS;
}

template <class Kernel>
cudaError_t launch(typename Kernel::Params& params, cudaStream_t stream) {
  using Cluster = typename Kernel::ClusterShape;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(Cluster{}), cute::size<1>(Cluster{}), 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = Kernel::get_grid_shape(params);
  launch.blockDim = Kernel::get_block_shape();
  launch.dynamicSmemBytes = Kernel::SharedStorageSize;
  launch.stream = stream;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  void* parameters[] = {&params};
  return cudaLaunchKernelExC(&launch, entry_of<Kernel>(), parameters);
}

// Calls `enqueue` with `device` current.
template <class Enqueue>
cudaError_t on_device(int device, Enqueue enqueue) {
  int before = device;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) {
    error = cudaSetDevice(device);
  }
  if (error != cudaSuccess) {
    return error;
  }
  error = enqueue();
  if (before != device) {
    cudaSetDevice(before);
  }
  return error;
}

// The walk over a shape's tiles: swizzled groups `swizzle` (1, 2, 4, 8) tiles wide, along raster 0 heuristic, 1 rows,
// 2 columns.
template <class Arguments>
void set_walk(Arguments& arguments, int swizzle, int raster) {
  using Raster = decltype(arguments.raster_order);
  arguments.max_swizzle_size = swizzle;
  arguments.raster_order = raster == 1 ? Raster::AlongM : raster == 2 ? Raster::AlongN : Raster::Heuristic;
}

inline cutlass::KernelHardwareInfo hardware_of(int device) {
  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = device;
  hardware.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device);
  return hardware;
}

}  // namespace slope
