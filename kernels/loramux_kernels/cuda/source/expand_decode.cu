// y_T,slice j += left_TR @ B_RO for every tile of up to 16 tokens, in one launch, from what the shrink handed over.
//
// Warps are independent and wait for nothing but memory: each walks over its share of one tile's outputs, 64 at a time.
// Lane 4g + t copies 16 bytes of rank rows 4t to 4t + 3 of B, its left operand and its part of y through a ring in
// shared memory that only this lane reads back. y is read once, added to in float32 and rounded once.

#include "handoff.cuh"

namespace loramux {

constexpr int WARPS = 4, THREADS = WARPS * WARP, STAGES = 4;

struct ExpandArgs {
  const element* weights;
  const float* floats;
  const int* count;  // tiles of the step; none if negative
  const Handoff* handoff;
  const Left* left;
  element* y;
  i64 y_stride;
  int slices, widths[MAX_SLICES];
};

struct Stage {
  Vector b[4][WARP], left[WARP], y[4][WARP];
};

struct Shared {
  Stage ring[WARPS][STAGES];
};

// `columns` times 64 outputs of slice `slice` from output `first` on, whose first column in y is `column`.
template <typename T>
__device__ __forceinline__ void run(const ExpandArgs& args, int at, int width, int column, int first, int columns,
                                    Stage* ring) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const Handoff& handoff = args.handoff[at];
  const Left* left = args.left + static_cast<i64>(at) * MAX_BLOCKS;
  const int blocks = handoff.blocks, id[2] = {handoff.ids[g], handoff.ids[g + 8]};
  const u32 all_rows = handoff.rows[lane % MAX_BLOCKS];
  const Outputs outputs = handoff.outputs;
  if (blocks == 0 && !outputs.any()) return;
  const element* b = args.weights + handoff.b;
  element* y[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) y[i] = args.y + max(id[i], 0) * args.y_stride + column;
  // Without rank rows there is still y to change.
  const int rounds = max(blocks, 1), steps = columns * rounds;
  const int bands = handoff.bands, band_width = in_band(width, bands);
  int next_first = bands > 1 ? first / band_width * rounds : 0;  // block of its band
  // Where the next copy goes from: 64 outputs and block of rank rows.
  int next = 0, next_o = first, next_block = 0;
  const auto copy_next = [&] {
    const u32 rows = __shfl_sync(ALL, all_rows, next_first + next_block);
    if (next < steps) {
      Stage& stage = ring[next % STAGES];
      const int o = next_o + piece(g);
      const element* from = b + static_cast<i64>((rows & 0xffff) * MMA_ROWS + 4 * t) * width + o;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const bool in = blocks > 0 && o < width && (rows >> (16 + 4 * t + q) & 1);
        copy(&stage.b[q][lane], in ? from + q * width : args.weights, in);
      }
      if (blocks > 0) copy_cached(&stage.left[lane], &left[next_first + next_block][lane]);
      if (next_block == 0)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const int c = next_o + piece(2 * t + v % 2);
          const bool in = id[v / 2] >= 0 && c < width;
          copy(&stage.y[v][lane], in ? y[v / 2] + c : y[0], in);
        }
      if (++next_block == rounds) {
        next_block = 0;
        next_o += COLUMNS;
        if (bands > 1) next_first = next_o / band_width * rounds;
      }
    }
    ++next;
    commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) copy_next();
  for (int step = 0, o = first; step < steps; o += COLUMNS) {
    float acc[8][1][4] = {};
    Vector before[4];
    for (int block = 0; block < rounds; ++block, ++step) {
      wait<STAGES - 2>();
      Stage& stage = ring[step % STAGES];
      if (block == 0)
#pragma unroll
        for (int v = 0; v < 4; ++v) before[v] = stage.y[v][lane];
      if (blocks > 0) {
        const Vector l[1] = {stage.left[lane]};
        Vector w[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) w[q] = stage.b[q][lane];
        product<T, 1>(acc, l, w);
      }
      copy_next();
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int c = o + piece(2 * t + v % 2);
      if (id[v / 2] >= 0 && c < width)
        store(y[v / 2] + c, applied<T, 1>(before[v], acc, v / 2, v % 2, outputs, args.floats, c));
    }
  }
  wait<0>();
}

template <typename T>
__device__ __forceinline__ void expand(const ExpandArgs& args) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int warp = threadIdx.x / WARP;
  Stage* ring = reinterpret_cast<Shared*>(memory)->ring[warp];
  const int tiles = *args.count, walkers = gridDim.x * WARPS;
  if (tiles <= 0) return;
  int per_tile = 0;
  for (int j = 0; j < args.slices; ++j) per_tile += blocks_of(args.widths[j], COLUMNS);
  // Several warps share a tile. Neighbours in number are on different multiprocessors, so that few warps spread.
  const int lanes = min(max(walkers / tiles, 1), per_tile);
  for (int item = warp * gridDim.x + blockIdx.x; item < tiles * lanes; item += walkers) {
    const int index = item / lanes, lane = item % lanes;
    int begin = per_tile * lane / lanes, column = 0;
    int left = per_tile * (lane + 1) / lanes - begin;
    for (int j = 0; j < args.slices && left > 0; ++j) {
      const int in_slice = blocks_of(args.widths[j], COLUMNS);
      if (begin < in_slice) {
        const int columns = min(in_slice - begin, left);
        run<T>(args, place(index, args.slices, j), args.widths[j], column, COLUMNS * begin, columns, ring);
        left -= columns;
        begin = 0;
      } else {
        begin -= in_slice;
      }
      column += args.widths[j];
    }
  }
}

}  // namespace loramux

#define KERNEL(name, type)                                                                      \
  extern "C" __global__ void __launch_bounds__(loramux::THREADS, 3)                             \
      name(const __grid_constant__ loramux::ExpandArgs args) {                                  \
    loramux::expand<loramux::type>(args);                                                       \
  }                                                                                             \
  extern "C" __device__ const int name##_shared = sizeof(loramux::Shared);
KERNEL(expand_bfloat16, BFloat16)
KERNEL(expand_float16, Float16)
