// What the shrink of a decode step leaves for the expand, so that little stands between the base linear and the result:
// no table to look up, no gate to compute, no h to sum, scale and convert.
#pragma once

#include "common.cuh"

namespace loramux {

// One slice of one tile's adapter.
struct alignas(16) Handoff {
  Outputs outputs;
  i64 b;                 // offset of B in the weights
  int blocks;            // of 16 rank rows that any token takes, of one band
  int bands;             // of outputs, each with its own blocks
  int ids[MMA_ROWS];     // the tokens' rows of y, −1 beyond them
  u32 rows[MAX_BLOCKS];  // per block: its place among the slice's blocks, and in the upper half a bit per row that counts
};

// gate ⊙ scale ⊙ h of one block as the left operand of the product, for every lane.
using Left = Vector[WARP];

// Where slice `slice` of tile `tile` begins, in units of slices.
__device__ __forceinline__ int place(int tile, int slices, int slice) { return tile * slices + slice; }

}  // namespace loramux
