// What all kernels share: the tables they read, and the product of the expand. Letters as in ops/: T tokens, I inputs,
// R rank rows, O outputs, E experts. No header of the CUDA toolkit is needed, so that NVRTC alone can compile it. Names
// in capitals that begin with LORAMUX are defined on the compiler's command line (compiler.py).
#pragma once

#include "ptx.cuh"

namespace loramux {

constexpr int MMA_ROWS = 16;     // rows of one matrix product: rank rows in the shrink, tokens in the expand
constexpr int CHUNK = 32;        // inputs that one 16-byte access of each of four lanes covers
constexpr int COLUMNS = 64;      // outputs of one step of a warp in the expand
constexpr int MAX_EXPERTS = LORAMUX_MAX_EXPERTS;  // gates.py
constexpr int MAX_SLICES = 4;    // of a site
constexpr int MAX_BLOCKS = 16;   // of 16 rank rows of one slice

// Columns of a site's table row (sites.py): the head, then one part per slice.
constexpr int HEAD = LORAMUX_TABLE_HEAD, PART = LORAMUX_TABLE_PART;
enum Head { A_OFFSET, SCALE_OFFSET, EXPERT_OFFSET, ROWS, COUNTED, MOMENTS, BANDS };
enum Part { FIRST_ROW, RANK, B_OFFSET, EXPERTS, LOGITS, RULE, MAG = RULE + LORAMUX_GATE_FIELDS, BIAS, COUNTS, SUMS };

// A tile of the plan (plan.py): tokens of one slot, `start` into the step's token ids.
struct Tile {
  int slot, start, count;
};

__device__ __forceinline__ Tile read_tile(const int* tiles, int index) {
  const int* fields = tiles + 3 * index;
  return {__ldg(fields), __ldg(fields + 1), __ldg(fields + 2)};
}

__device__ __forceinline__ int blocks_of(int size, int length) { return (size + length - 1) / length; }

// How many of `size` belong to one of an adapter's bands. Nearly all have one, and need no division.
__device__ __forceinline__ int in_band(int size, int bands) { return bands > 1 ? size / bands : size; }

// One slice of one tile's adapter, as the table has it.
struct Slice {
  const i64* part;
  const float* scales;
  const int* expert_of;
  int rank, first_row, experts;

  __device__ __forceinline__ Slice(const i64* row, int slice, const float* floats, const int* ints)
      : part(row + HEAD + PART * slice),
        rank(static_cast<int>(part[RANK])),
        first_row(static_cast<int>(part[FIRST_ROW])),
        experts(static_cast<int>(part[EXPERTS])) {
    scales = floats + row[SCALE_OFFSET] + first_row;
    expert_of = ints + row[EXPERT_OFFSET] + first_row;
  }
};

// A lane's part of 16 rank rows from block·16 on: rows 4t to 4t + 3, which of them count, and their factors.
struct Rows {
  int expert[4];
  float factor[4];
  bool use[4];
  u32 mask;  // of all 16 rows, a bit per row that counts

  // `shift`: of the first row's place among all scales.
  __device__ __forceinline__ Rows(const Slice& s, int block, u32 taken, int shift) : mask(0) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int r = block * MMA_ROWS + 4 * t + q;
      expert[q] = r < s.rank && s.experts > 0 ? __ldg(s.expert_of + r) : 0;
      factor[q] = r < s.rank ? __ldg(s.scales + shift + r) : 0.f;
      use[q] = r < s.rank && (taken >> expert[q] & 1);
      mask |= use[q] ? 1u << (4 * t + q) : 0u;
    }
    mask = __reduce_or_sync(ALL, mask);
  }
};

// acc[n] += left · B for 64 outputs: lane 4g + t brings 16 bytes of B's rank rows 4t to 4t + 3, at outputs of piece(g);
// acc[n] are the n-th of the eight outputs of piece(2t) and piece(2t + 1), of tokens g and g + 8.
template <typename T, int MT>
__device__ __forceinline__ void product(float (&acc)[8][MT][4], const Vector (&left)[MT], const Vector (&b)[4]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const u32 halves = n % 2 ? 0x7632 : 0x5410;
    const u32 b0 = __byte_perm(b[0].words[n / 2], b[1].words[n / 2], halves);
    const u32 b1 = __byte_perm(b[2].words[n / 2], b[3].words[n / 2], halves);
#pragma unroll
    for (int m = 0; m < MT; ++m)
      T::mma(acc[n][m], left[m].words[0], left[m].words[1], left[m].words[2], left[m].words[3], b0, b1);
  }
}

// First of a lane's eight neighbouring outputs among 64: what four lanes store together is 64 bytes in a row.
__device__ __forceinline__ int piece(int n) { return 8 * (n / 2 + 4 * (n % 2)); }

// What a slice does to the base linear's output besides adding to it: offsets of float32 arrays plus one, 0 for none.
struct alignas(16) Outputs {
  i64 mag, bias;

  __device__ __forceinline__ bool any() const { return mag != 0 || bias != 0; }
};

// mag ⊙ y + acc + bias for tokens g + 8i and outputs of piece(2t + j), the first of which is `column` of the slice.
template <typename T, int MT>
__device__ __forceinline__ Vector applied(Vector y, const float (&acc)[8][MT][4], int i, int j, const Outputs& outputs,
                                          const float* floats, int column) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int k = 2 * (i % 2) + j;
    float low = T::low(y.words[q]), high = T::high(y.words[q]);
    if (outputs.mag != 0) {
      const float* mag = floats + outputs.mag - 1 + column + 2 * q;
      low *= __ldg(mag);
      high *= __ldg(mag + 1);
    }
    low += acc[2 * q][i / 2][k];
    high += acc[2 * q + 1][i / 2][k];
    if (outputs.bias != 0) {
      const float* bias = floats + outputs.bias - 1 + column + 2 * q;
      low += __ldg(bias);
      high += __ldg(bias + 1);
    }
    y.words[q] = T::pack(low, high);
  }
  return y;
}

}  // namespace loramux
