// Y [T, R] = max(X [T, S] W^T + beta C + b, floor) with W [R, S] 2:4 along S, on Hopper's sparse tensor cores (wgmma.sp).
//
// T tokens, R rows and S columns of the sparse operand; 16-bit values, fp32 sums.
//     values     [R, S/2]   the kept values row-major: a packed parameter as it lies in memory
//     metadata   uint8      where they are; the order is CUTLASS's, see slope_metadata_places
//     X [T, S], C and Y [T, R]: row-major, Y's rows `stride` elements apart; b [R]
// CUTLASS wants the sparse matrix on the left: it computes Y^T = W X^T, and with Y^T column-major memory holds Y row-major.
// Every extent may be odd in tiles; R must be a multiple of 8 and S of 16 (lines of 16 bytes for TMA).
//
// One shared library for each kernel: the macros say which. Nothing here waits or takes device memory; `launch_sm90.h` has
// the host's side.

#include <array>
#include <cstdint>
#include <limits>

#include "cutlass/cutlass.h"
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

#include "launch_sm90.h"

#ifndef SLOPE_ELEMENT
#define SLOPE_ELEMENT cutlass::bfloat16_t
#define SLOPE_TILE_R 128
#define SLOPE_TILE_T 256
#define SLOPE_TILE_S 64
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
constexpr bool kCooperative = is_same_v<Mainloop, cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
using Store = conditional_t<kCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                            cutlass::epilogue::TmaWarpSpecialized>;
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

using Params = typename Kernel::Params;

// Addresses are the device's; a null bias is none, and a null source needs beta 0. `cutlass.py` has its twin.
struct Product {
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
  int32_t device;
  float beta;
  int32_t relu;
  // As `set_walk` takes them; its columns are tokens here.
  int32_t swizzle;
  int32_t raster;
};

auto shape_of(Product const& p) { return make_shape(p.rows, p.tokens, p.columns, 1); }

auto fusion_of(Product const& p) {
  typename Epilogue::FusionCallbacks::Arguments fusion{};
  fusion.alpha = 1.0f;
  fusion.beta = p.beta;
  fusion.bias_ptr = static_cast<Element const*>(p.bias);
  fusion.activation = {p.relu ? 0.0f : -std::numeric_limits<float>::infinity()};
  return fusion;
}

typename Kernel::Arguments arguments_of(Product const& p) {
  auto shape = shape_of(p);
  auto ldx = make_stride(int64_t(p.columns), _1{}, int64_t(0));
  auto ldy = make_stride(_1{}, p.stride, int64_t(0));
  typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      shape,
      {static_cast<Element const*>(p.values), SparseConfig::fill_layoutA(shape), static_cast<Element const*>(p.x), ldx,
       static_cast<typename Collective::ElementE const*>(p.metadata), SparseConfig::fill_layoutE(shape)},
      {fusion_of(p), static_cast<typename Epilogue::ElementC const*>(p.source), ldy, static_cast<Element*>(p.y), ldy},
      hardware_of(p.device)};
  set_walk(arguments.scheduler, p.swizzle, p.raster);
  return arguments;
}

bool move(Params& params, Product const& p) {
  params.epilogue.thread =
      Epilogue::FusionCallbacks::to_underlying_arguments(shape_of(p), fusion_of(p), nullptr);
  bool moved = move(params.mainloop.tma_load_a, p.values) && move(params.mainloop.tma_load_e, p.metadata) &&
               move(params.mainloop.tma_load_b, p.x) && move(params.epilogue.tma_store_d, p.y);
  if constexpr (SLOPE_SOURCE) {
    moved = moved && move(params.epilogue.tma_load_c, p.source);
  }
  return moved;
}

extern "C" {

// Enqueues the product; 0, or a cudaError_t: invalid value where the kernel cannot run the shape.
int slope_sparse_gemm(Product const* p, void* stream) {
  return on_device(p->device, [&] {
    std::array<int64_t, 7> key{p->rows, p->columns, p->tokens, p->stride, p->device, p->swizzle, p->raster};
    Params const* kept = kept_params<Kernel>(key, [&] { return arguments_of(*p); }, [](Params&) {});
    if (!kept) {
      return cudaErrorInvalidValue;
    }
    Params params = *kept;
    return move(params, *p) ? launch<Kernel>(params, static_cast<cudaStream_t>(stream)) : cudaErrorInvalidValue;
  });
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
