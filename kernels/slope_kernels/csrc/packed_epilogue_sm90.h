// An epilogue that keeps two of every four neighbours of a row: packed [R, C/2] from the sums of a tile of D [R, C].
//
//     row_bits   uint8 [R, C/8], a bit a column, lowest first; two of every four are set
//     packed     16-bit values, rounded once
// R and C are multiples of 64. D itself is never written.
//
// A thread of wgmma has, of the rows r and r + 8, the columns 8 j + 2 q + {0, 1}, q its number in a quad of lanes: a
// group of four is in two lanes. Of 32 columns (j = 0..3, one word of row bits), q is to have all of j = q, so that a
// quad writes a row's kept values next to each other. Two exchanges do it, of halves that the other lane wants:
//     lanes q, q ^ 1   columns: afterwards q has whole groups, the (q / 2)-th of j = q mod 2 and of j = 2 + q mod 2
//     lanes q, q ^ 2   kept values: afterwards both groups of j = q
// Warps write whole sectors of 32 bytes.

#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/detail.hpp"
#include "cutlass/numeric_conversion.h"

namespace slope {

struct Pair {
  float first, second;
};

CUTLASS_DEVICE Pair exchange(Pair pair, int lanes) {
  return {__shfl_xor_sync(0xffffffffu, pair.first, lanes), __shfl_xor_sync(0xffffffffu, pair.second, lanes)};
}

// The two of four neighbours whose bits are set.
CUTLASS_DEVICE Pair kept(Pair front, Pair back, uint32_t nibble) {
  return {nibble & 1 ? front.first : nibble & 2 ? front.second : back.first,
          nibble & 8 ? back.second : nibble & 4 ? back.first : front.second};
}

// The kept values of the eight columns j = q of 32, from a thread's pairs of j = 0..3.
CUTLASS_DEVICE cutlass::Array<float, 4> kept_of_quad(Pair const (&pairs)[4], uint32_t bits, int q) {
  bool const odd = q & 1, upper = q & 2;
  uint32_t const nibbles = bits >> (8 * odd + 4 * upper);
  Pair half[2];
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    Pair mine = odd ? pairs[2 * i + 1] : pairs[2 * i];
    Pair theirs = exchange(odd ? pairs[2 * i] : pairs[2 * i + 1], 1);
    half[i] = kept(odd ? theirs : mine, odd ? mine : theirs, nibbles >> (16 * i));
  }
  Pair mine = upper ? half[1] : half[0];
  Pair theirs = exchange(upper ? half[0] : half[1], 2);
  Pair front = upper ? theirs : mine, back = upper ? mine : theirs;
  return {front.first, front.second, back.first, back.second};
}

// What the warp-specialized kernels ask of an epilogue, by way of `Sm90TmaWarpSpecializedAdapter`.
template <class Element>
class PackedEpilogue {
 public:
  using ElementC = void;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using ElementD = Element;
  using StrideD = StrideC;
  // Nothing, but aligned as the main loop's tiles behind it want to be: swizzled patterns repeat after 1024 bytes.
  struct alignas(1024) SharedStorage {};
  struct Arguments {
    uint8_t const* row_bits = nullptr;
    Element* packed = nullptr;
  };
  using Params = Arguments;

  template <class Problem>
  static constexpr Params to_underlying_arguments(Problem const&, Arguments const& arguments, void*) {
    return arguments;
  }

  template <class Problem>
  static size_t get_workspace_size(Problem const&, Arguments const&) {
    return 0;
  }

  template <class Problem>
  static cutlass::Status initialize_workspace(
      Problem const&, Arguments const&, void*, cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  template <class Problem>
  static bool can_implement(Problem const& problem, Arguments const&) {
    return cute::get<0>(problem) % 64 == 0 && cute::get<1>(problem) % 64 == 0;
  }

  CUTLASS_DEVICE explicit PackedEpilogue(Params const& params) : params(params) {}

  // All that a thread has of a tile.
  template <class Problem, class Tile, class Coord, class Engine, class Layout, class Mma, class Residue>
  CUTLASS_DEVICE void operator()(
      Problem problem, Tile tile, Coord coord, cute::Tensor<Engine, Layout> const& sums, Mma mma, Residue, int thread,
      char*) {
    using namespace cute;
    auto places = mma.get_slice(thread).partition_C(make_identity_tensor(take<0, 2>(tile)));
    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < size<1>(sums); ++m) {
      CUTLASS_PRAGMA_UNROLL
      for (int n = 0; n < size<2>(sums); ++n) {
        auto first = places(make_coord(make_coord(_0{}, _0{}, _0{}), m, n));
        int row = get<0>(coord) * get<0>(tile) + get<0>(first);
        int column = get<1>(coord) * get<1>(tile) + get<1>(first) - thread % 4 * 2;
        // The same for a whole warp: it has 16 rows, and there are whole 64.
        if (row < get<0>(problem)) {
          rows_of_thread(sums, m, n, row, column, get<1>(problem), thread % 4);
        }
      }
    }
  }

 private:
  // The rows `row` and `row + 8` of one instruction's sums ((2, 2, columns / 8), m, n), whose quad begins at `column`.
  template <class Sums>
  CUTLASS_DEVICE void rows_of_thread(Sums const& sums, int m, int n, int row, int column, int columns, int q) {
    using cute::make_coord;
    constexpr int kWords = decltype(cute::size<0, 2>(sums))::value / 4;
    static_assert(kWords % 2 == 0, "row bits are read 64 columns at a time");
    uint32_t bits[2][kWords];
    Element* place[2];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      auto start = params.row_bits + int64_t(row + 8 * i) * (columns / 8) + column / 8;
      CUTLASS_PRAGMA_UNROLL
      for (int word = 0; word < kWords; word += 2) {
        uint2 two = column + word * 32 < columns ? *reinterpret_cast<uint2 const*>(start + word * 4) : uint2{0, 0};
        bits[i][word] = two.x;
        bits[i][word + 1] = two.y;
      }
      place[i] = params.packed + int64_t(row + 8 * i) * (columns / 2) + column / 2 + 4 * q;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kWords; ++i) {
      int word = i / 2;
      Pair pairs[4];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 4; ++j) {
        pairs[j] = {sums(make_coord(0, i % 2, word * 4 + j), m, n), sums(make_coord(1, i % 2, word * 4 + j), m, n)};
      }
      auto four = kept_of_quad(pairs, bits[i % 2][word], q);
      if (column + word * 32 < columns) {
        store(place[i % 2] + word * 16, four);
      }
    }
  }

  CUTLASS_DEVICE static void store(Element* place, cutlass::Array<float, 4> const& four) {
    using Four = cutlass::AlignedArray<Element, 4>;
    *reinterpret_cast<Four*>(place) = Four{cutlass::NumericArrayConverter<Element, float, 4>{}(four)};
  }

  Params params;
};

}  // namespace slope
