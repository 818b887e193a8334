// packed [R, C/2] = the kept half of D [R, C] = S X, on Hopper's sparse tensor cores: dW without a dense dW.
//
// T tokens; R rows and C columns of the weight; 16-bit values, fp32 sums.
//     S [R, T]   P(dY)^T, 2:4 along the tokens: values [R, S/2] row-major, metadata in CUTLASS's order; zeros up to S,
//                T filled up to a multiple of 64
//     X [T, C]   row-major, as it lies
//     row_bits   uint8 [R, C/8]: which half
//     packed     16-bit, rounded once: `packed_epilogue_sm90.h`
// R and C are multiples of 64; every address is on a line of 16 bytes.
//
// One shared library for each kernel: the macros say which. Nothing here waits or takes device memory; the host's side
// is in `launch_sm90.h`.

#include <array>
#include <cstdint>

#include "cutlass/cutlass.h"
#include "cutlass/gemm/collective/collective_builder_decl.hpp"
#include "cutlass/gemm/collective/collective_mma_decl.hpp"
#include "cutlass/gemm/collective/sm90_sparse_mma_tma_gmma_ss_warpspecialized.hpp"
#include "cutlass/gemm/collective/builders/sm90_sparse_gmma_builder.inl"
#include "cutlass/gemm/kernel/gemm_universal_decl.h"
#include "cutlass/gemm/kernel/sm90_gemm_tma_warpspecialized_cooperative.hpp"

#include "launch_sm90.h"
#include "packed_epilogue_sm90.h"

#ifndef SLOPE_ELEMENT
#define SLOPE_ELEMENT cutlass::bfloat16_t
#define SLOPE_TILE_R 128
#define SLOPE_TILE_C 256
#define SLOPE_TILE_T 64
#define SLOPE_CLUSTER_R 2
#define SLOPE_CLUSTER_C 1
#endif

namespace slope {

using namespace cute;

using Element = SLOPE_ELEMENT;
using Values = cutlass::layout::RowMajor;
using Inputs = cutlass::layout::RowMajor;
constexpr int kLine = 128 / cutlass::sizeof_bits<Element>::value;

using Tile = Shape<Int<SLOPE_TILE_R>, Int<SLOPE_TILE_C>, Int<SLOPE_TILE_T>>;
using Cluster = Shape<Int<SLOPE_CLUSTER_R>, Int<SLOPE_CLUSTER_C>, _1>;

using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<PackedEpilogue<Element>>;
using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp,
    Element, Values, kLine, Element, Inputs, kLine, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Collective, Epilogue>;
using SparseConfig = typename Collective::SparseConfig;
static_assert(alignof(typename Kernel::SharedStorage) == alignof(typename Epilogue::SharedStorage));
static_assert(Kernel::SharedStorageSize <= cutlass::gemm::collective::detail::sm90_smem_capacity_bytes);

using Params = typename Kernel::Params;

// Addresses are the device's. `packed_wgrad.py` has its twin.
struct Product {
  void const* values;
  void const* metadata;
  void const* x;
  void const* row_bits;
  void* packed;
  int32_t rows;
  int32_t columns;
  int32_t tokens;
  int32_t device;
  // As `set_walk` takes them.
  int32_t swizzle;
  int32_t raster;
};

auto epilogue_of(Product const& p) {
  return typename Epilogue::Arguments{static_cast<uint8_t const*>(p.row_bits), static_cast<Element*>(p.packed)};
}

// S has as many tokens as its blocks of metadata.
auto shape_of(Product const& p) { return make_shape(p.rows, p.columns, (p.tokens + 63) / 64 * 64, 1); }

auto mainloop_of(Product const& p) {
  auto shape = shape_of(p);
  auto ldx = make_stride(_1{}, int64_t(p.columns), int64_t(0));
  return typename Collective::Arguments{
      static_cast<Element const*>(p.values), SparseConfig::fill_layoutA(shape), static_cast<Element const*>(p.x), ldx,
      static_cast<typename Collective::ElementE const*>(p.metadata), SparseConfig::fill_layoutE(shape)};
}

typename Kernel::Arguments arguments_of(Product const& p) {
  typename Kernel::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm, shape_of(p), mainloop_of(p), epilogue_of(p), hardware_of(p.device)};
  set_walk(arguments.scheduler, p.swizzle, p.raster);
  return arguments;
}

// X ends at its last token, where S goes on with zeros: the tensor map gives zeros for what lies past it.
void end_x(Params& params, Product const& p) {
  auto shape = make_shape(p.rows, p.columns, p.tokens, 1);
  params.mainloop.tma_load_b = Collective::to_underlying_arguments(shape, mainloop_of(p), nullptr).tma_load_b;
}

bool move(Params& params, Product const& p) {
  params.epilogue = epilogue_of(p);
  return move(params.mainloop.tma_load_a, p.values) && move(params.mainloop.tma_load_e, p.metadata) &&
         move(params.mainloop.tma_load_b, p.x);
}

extern "C" {

// Enqueues the product; 0, or a cudaError_t: invalid value where the kernel cannot run the shape.
int slope_packed_wgrad(Product const* p, void* stream) {
  return on_device(p->device, [&] {
    std::array<int64_t, 6> key{p->rows, p->columns, p->tokens, p->device, p->swizzle, p->raster};
    Params const* kept =
        kept_params<Kernel>(key, [&] { return arguments_of(*p); }, [&](Params& params) { end_x(params, *p); });
    if (!kept) {
      return cudaErrorInvalidValue;
    }
    Params params = *kept;
    return move(params, *p) ? launch<Kernel>(params, static_cast<cudaStream_t>(stream)) : cudaErrorInvalidValue;
  });
}

// Stages of the main loop and bytes of shared memory, for reports.
int slope_stages() { return Collective::DispatchPolicy::Stages; }
int slope_shared_memory() { return Kernel::SharedStorageSize; }

char const* slope_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"

}  // namespace slope
