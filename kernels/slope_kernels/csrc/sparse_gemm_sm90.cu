// Y [T, R] = max(X [T, S] W^T + beta C + b, floor) with W [R, S] 2:4 along S, on Hopper's sparse tensor cores (wgmma.sp).
//
// T tokens, R rows and S columns of the sparse operand; 16-bit values, fp32 sums.
//     values     [R, S/2]   the kept values row-major: a packed parameter as it lies in memory
//     metadata   uint8      where they are; the order is CUTLASS's, see slope_metadata_places
//     X [T, S], C and Y [T, R]: row-major, Y's rows `stride` elements apart; b [R]
// CUTLASS wants the sparse matrix on the left: it computes Y^T = W X^T, and with Y^T column-major memory holds Y row-major.
// Every extent may be odd in tiles; R must be a multiple of 8 and S of 16 (lines of 16 bytes for TMA).
//
// One shared library for each kernel: the macros say which. Nothing here allocates, waits or keeps state.

#include <cstdint>
#include <limits>

#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/epilogue/thread/activation.h"
#include "cutlass/gemm/collective/collective_builder_decl.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm90_sparse_mma_tma_gmma_ss_warpspecialized.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_gmma_builder.inl"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_pingpong.hpp"

#ifndef SLOPE_ELEMENT
#define SLOPE_ELEMENT cutlass::bfloat16_t
#define SLOPE_TILE_R 256
#define SLOPE_TILE_T 192
#define SLOPE_TILE_S 128
#define SLOPE_CLUSTER_R 2
#define SLOPE_CLUSTER_T 1
#define SLOPE_SCHEDULE Cooperative
#define SLOPE_SOURCE 0
#endif
#define SLOPE_JOIN_(a, b) a##b
#define SLOPE_JOIN(a, b) SLOPE_JOIN_(a, b)

namespace slope {

using namespace cute;

using Element = SLOPE_ELEMENT;
using Values = cutlass::layout::RowMajor;
using Tokens = cutlass::layout::ColumnMajor;
constexpr int kLine = 128 / cutlass::sizeof_bits<Element>::value;

using Tile = Shape<Int<SLOPE_TILE_R>, Int<SLOPE_TILE_T>, Int<SLOPE_TILE_S>>;
using Cluster = Shape<Int<SLOPE_CLUSTER_R>, Int<SLOPE_CLUSTER_T>, _1>;
using Mainloop = SLOPE_JOIN(cutlass::gemm::KernelTmaWarpSpecialized, SLOPE_SCHEDULE);
using Store = conditional_t<is_same_v<Mainloop, cutlass::gemm::KernelTmaWarpSpecializedCooperative>,
                            cutlass::epilogue::TmaWarpSpecializedCooperative, cutlass::epilogue::TmaWarpSpecialized>;
// Without a source its share of shared memory goes to the main loop.
using Source = conditional_t<SLOPE_SOURCE, Element, void>;

using Fusion = cutlass::epilogue::fusion::LinCombPerRowBiasEltAct<
    cutlass::epilogue::thread::LowerBound, Element, float, Element, Source, float, 1>;
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float,
    Source, Tokens, kLine, Element, Tokens, kLine, Store, Fusion>::CollectiveOp;
using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp,
    Element, Values, kLine, Element, Tokens, kLine, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    Mainloop>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Collective, Epilogue>;
using SparseConfig = typename Collective::SparseConfig;

extern "C" {

// Addresses are the device's; a null bias is none, and a null source needs beta 0. `load_cuda.py` has its twin.
struct SlopeProduct {
  void const* values;
  void const* metadata;
  void const* x;
  void const* bias;
  void const* source;
  void* y;
  int64_t stride;
  int32_t rows;
  int32_t columns;
  int32_t tokens;
  int32_t multiprocessors;
  float beta;
  int32_t relu;
  // How many tiles a swizzled group is wide (1, 2, 4, 8), and along what tiles are walked: 0 heuristic, 1 rows, 2 tokens.
  int32_t swizzle;
  int32_t raster;
};

// Enqueues the product; 0, or a cudaError_t: invalid value where the kernel cannot run the shape.
int slope_sparse_gemm(SlopeProduct const* p, void* stream) {
  auto shape = make_shape(p->rows, p->tokens, p->columns, 1);
  auto ldx = make_stride(int64_t(p->columns), _1{}, int64_t(0));
  auto ldy = make_stride(_1{}, p->stride, int64_t(0));
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = p->multiprocessors;
  typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      shape,
      {static_cast<Element const*>(p->values), SparseConfig::fill_layoutA(shape), static_cast<Element const*>(p->x), ldx,
       static_cast<typename Collective::ElementE const*>(p->metadata), SparseConfig::fill_layoutE(shape)},
      {{}, static_cast<typename Epilogue::ElementC const*>(p->source), ldy, static_cast<Element*>(p->y), ldy},
      hardware};
  auto& fusion = arguments.epilogue.thread;
  fusion.alpha = 1.0f;
  fusion.beta = p->beta;
  fusion.bias_ptr = static_cast<Element const*>(p->bias);
  fusion.activation = {p->relu ? 0.0f : -std::numeric_limits<float>::infinity()};
  arguments.scheduler.max_swizzle_size = p->swizzle;
  using Raster = decltype(arguments.scheduler.raster_order);
  arguments.scheduler.raster_order = p->raster == 1 ? Raster::AlongM : p->raster == 2 ? Raster::AlongN : Raster::Heuristic;
  if (!Kernel::can_implement(arguments)) {
    return cudaErrorInvalidValue;
  }
  auto params = Kernel::to_underlying_arguments(arguments, nullptr);
  auto kernel = reinterpret_cast<void const*>(&cutlass::device_kernel<Kernel>);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
  if (error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {SLOPE_CLUSTER_R, SLOPE_CLUSTER_T, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = Kernel::get_grid_shape(params);
  launch.blockDim = Kernel::get_block_shape();
  launch.dynamicSmemBytes = Kernel::SharedStorageSize;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  void* parameters[] = {&params};
  return cudaLaunchKernelExC(&launch, kernel, parameters);
}

// Bytes of an operand's metadata.
int64_t slope_metadata_bytes(int rows, int columns) {
  return cosize(SparseConfig::fill_layoutE(make_shape(rows, 1, columns, 1))) / 8;
}

// For each group of four weights, row-major [rows, columns / 4]: the number of its nibble, the lower half of a byte first.
// Runs on the host; it is there so that whoever writes metadata can check its order against CUTLASS's.
void slope_metadata_places(int rows, int columns, int64_t* places) {
  auto layout = SparseConfig::fill_layoutE(make_shape(rows, 1, columns, 1));
  for (int row = 0; row < rows; ++row) {
    for (int group = 0; group < columns / 4; ++group) {
      places[int64_t(row) * (columns / 4) + group] = layout(row, group * 4, 0) / 4;
    }
  }
}

// Stages of the main loop and bytes of shared memory, for reports.
int slope_stages() { return Collective::DispatchPolicy::Stages; }
int slope_shared_memory() { return Kernel::SharedStorageSize; }

char const* slope_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"

}  // namespace slope
