// y_T,slice j += (gate ⊙ scale ⊙ h)_TR @ B_RO for every tile of up to 64 tokens, in one launch.
//
// A thread block walks over its share of one tile's outputs, in runs within one slice. For a run it brings gate ⊙ scale
// ⊙ h into the form of the product's left operand once; then each warp takes every fourth 64 outputs, with B through a
// ring as in expand_decode.cu. y is read once, added to in float32 and rounded once.

#include "capacity.cuh"

namespace loramux {

constexpr int WARPS = 4, THREADS = WARPS * WARP, STAGES = 4, MT = 4, TOKENS = MT * MMA_ROWS;

struct ExpandArgs {
  const float* h;
  const element* weights;
  const float* floats;
  const int* ints;
  const i64* table;
  const int* count;  // tiles of the step; none if negative
  const int* tiles;
  const int* token_ids;
  element* y;
  float* trace;
  const int* trace_flag;
  const int* places;
  int* counts;  // the ints, to be written
  i64 h_stride, table_stride, y_stride;
  int first_gate, traced, slices, widths[MAX_SLICES];
};

struct Shared {
  Vector left[MAX_BLOCKS][MT][WARP];  // gate ⊙ scale ⊙ h, as each lane needs it
  Vector b[WARPS][STAGES][4][WARP];   // what each lane copied of B
  float gates[TOKENS][MAX_EXPERTS];
  Room<TOKENS> room;
  u32 taken[WARPS], masks[MAX_BLOCKS];  // experts that a warp's tokens take; rows of each block that any takes
};

// Neighbouring outputs of one slice for one tile.
struct Run {
  Tile tile;
  Slice slice;
  int blocks, width, column, first, columns, rows, bands;  // … and of A

  __device__ __forceinline__ Outputs outputs() const { return {slice.part[MAG], slice.part[BIAS]}; }
};

// Gate, then left operands and rows that count of all blocks of 16 rank rows.
template <typename T>
__device__ __forceinline__ void prepare(const ExpandArgs& args, const Run& run, Shared& shared, float* trace) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const Slice& s = run.slice;
  const int* ids = args.token_ids + run.tile.start;
  u32 taken = ALL;
  if (s.experts > 0) {
    const float* logits = args.h + static_cast<int>(s.part[LOGITS]);
    const float *moments = args.h + run.rows, *sums = args.floats + s.part[SUMS] - 1;
    const Rule rule(s.part + RULE, s.experts);
    const auto logit = [&](int id, int e) {
      const i64 at = id * args.h_stride;
      return rule.flags & LAYER_NORM ? normalised(rule, logits[at + e], __ldg(sums + e), moments[at], moments[at + 1])
                                     : logits[at + e];
    };
    if (rule.flags & LIMITED)
      limit<TOKENS, THREADS>(rule, logit, args.places, args.counts + s.part[COUNTS] - 1, ids, run.tile.count, shared.room,
                             run.first == 0);
    const u32 mine = gate<TOKENS, THREADS>(rule, logit, ids, run.tile.count, threadIdx.x, shared.gates,
                                           shared.room.full, TraceRows{trace, args.traced});
    if (lane == 0) shared.taken[warp] = mine;
    __syncthreads();
    taken = shared.taken[0] | shared.taken[1] | shared.taken[2] | shared.taken[3];
  }
  for (int at = warp; at < run.blocks * run.bands; at += WARPS) {
    const int band = run.bands > 1 ? at / run.blocks : 0, block = at - band * run.blocks, shift = band * run.rows;
    const Rows rows(s, block, taken, shift);
    if (lane == 0) shared.masks[at] = rows.mask;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      Vector left;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 16 * m + 8 * i + g;
        const bool live = token < run.tile.count;
        const float* h = args.h + (live ? __ldg(ids + token) : 0) * args.h_stride + shift + s.first_row +
                         block * MMA_ROWS + 4 * t;
        float v[4];
        // What the shrink did not write, and what no gate selects, may hold anything: replaced, never multiplied.
#pragma unroll
        for (int q = 0; q < 4; ++q) v[q] = live && rows.use[q] ? h[q] : 0.f;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float weight = s.experts > 0 ? shared.gates[token][rows.expert[q]] : 1.f;
          v[q] = weight != 0.f ? v[q] * rows.factor[q] * weight : 0.f;
        }
        left.words[i] = T::pack(v[0], v[1]);
        left.words[2 + i] = T::pack(v[2], v[3]);
      }
      shared.left[at][m][lane] = left;
    }
  }
}

template <typename T>
__device__ __forceinline__ void run_blocks(const ExpandArgs& args, const Run& run, Shared& shared, float* trace) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const element* b = args.weights + run.slice.part[B_OFFSET];
  const int mine = (run.columns - warp + WARPS - 1) / WARPS, steps = mine * run.blocks;
  // Where the next copy goes from: 64 outputs and block of rank rows.
  int next = 0, next_o = run.first + COLUMNS * warp, next_block = 0;
  const auto copy_next = [&](bool known) {
    if (next < steps) {
      const int o = next_o + piece(g), r = next_block * MMA_ROWS + 4 * t;
      const u32 rows = known ? shared.masks[next_block] : ALL;
      const element* from = b + static_cast<i64>(r) * run.width + o;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const bool in = r + q < run.slice.rank && o < run.width && (rows >> (4 * t + q) & 1);
        copy(&shared.b[warp][next % STAGES][q][lane], in ? from + q * run.width : b, in);
      }
      if (++next_block == run.blocks) next_block = 0, next_o += COLUMNS * WARPS;
    }
    ++next;
    commit();
  };
  // Rows of B that no gate can rule out are on their way while the left operands are made.
  if (run.slice.experts == 0)
    for (int s = 0; s < STAGES - 1; ++s) copy_next(false);
  prepare<T>(args, run, shared, trace);
  __syncthreads();
  if (run.slice.experts > 0)
    for (int s = 0; s < STAGES - 1; ++s) copy_next(true);
  for (int item = 0, step = 0; item < mine; ++item) {
    const int o = run.first + COLUMNS * (warp + WARPS * item);
    float acc[8][MT][4] = {};
    const int base = run.bands > 1 ? o / (run.width / run.bands) * run.blocks : 0;
    for (int block = 0; block < run.blocks; ++block, ++step) {
      wait<STAGES - 2>();
      if (shared.masks[base + block] != 0) {
        Vector w[4], left[MT];
#pragma unroll
        for (int q = 0; q < 4; ++q) w[q] = shared.b[warp][step % STAGES][q][lane];
#pragma unroll
        for (int m = 0; m < MT; ++m) left[m] = shared.left[base + block][m][lane];
        product<T, MT>(acc, left, w);
      }
      copy_next(true);
    }
    const Outputs outputs = run.outputs();  // not kept while the products run: registers are short
    // A quarter of y at a time: registers are short.
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int j = quarter / 2, c = o + piece(2 * t + j);
      const auto token = [&](int i) { return g + 8 * (MT * (quarter % 2) + i); };
      element* y[MT];
      Vector v[MT];
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        const bool in = token(i) < run.tile.count && c < run.width;
        const i64 id = in ? __ldg(args.token_ids + run.tile.start + token(i)) : 0;
        y[i] = args.y + id * args.y_stride + run.column + c;
        v[i] = load(y[i], in);
      }
#pragma unroll
      for (int i = 0; i < MT; ++i)
        if (token(i) < run.tile.count && c < run.width)
          store(y[i], applied<T, MT>(v[i], acc, MT * (quarter % 2) + i, j, outputs, args.floats, c));
    }
  }
  wait<0>();
}

template <typename T>
__device__ __forceinline__ void expand(const ExpandArgs& args) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int tiles = *args.count, blocks = gridDim.x;
  if (tiles <= 0) return;
  const bool tracing = *args.trace_flag != 0;
  int per_tile = 0;
  for (int j = 0; j < args.slices; ++j) per_tile += blocks_of(args.widths[j], COLUMNS);
  // Several thread blocks share a tile: one round of them if that keeps most of the device busy, else about three.
  int lanes = blocks / tiles;
  if (8 * tiles * lanes < 7 * blocks) lanes = blocks_of(3 * blocks, tiles);
  lanes = min(lanes, per_tile);
  for (int item = blockIdx.x; item < tiles * lanes; item += blocks) {
    const int lane = item % lanes;
    const Tile tile = read_tile(args.tiles, item / lanes);
    const i64* row = args.table + tile.slot * args.table_stride;
    int begin = per_tile * lane / lanes, column = 0;
    int left = per_tile * (lane + 1) / lanes - begin;
    for (int j = 0; j < args.slices && left > 0; ++j) {
      const int width = args.widths[j], in_slice = blocks_of(width, COLUMNS);
      if (begin < in_slice) {
        const Slice slice(row, j, args.floats, args.ints);
        const Run run{tile,
                      slice,
                      blocks_of(slice.rank, MMA_ROWS),
                      width,
                      column,
                      COLUMNS * begin,
                      min(in_slice - begin, left),
                      static_cast<int>(row[ROWS]),
                      static_cast<int>(row[BANDS])};
        float* kept = args.trace + static_cast<i64>(args.first_gate + j) * args.traced * MAX_EXPERTS;
        if (run.blocks > 0 || run.outputs().any()) {
          run_blocks<T>(args, run, shared, tracing && run.first == 0 ? kept : nullptr);
          __syncthreads();  // the next run writes what others may still read
        }
        left -= run.columns;
        begin = 0;
      } else {
        begin -= in_slice;
      }
      column += width;
    }
  }
}

}  // namespace loramux

#define KERNEL(name, type)                                                                    \
  extern "C" __global__ void __launch_bounds__(loramux::THREADS, 2)                           \
      name(const __grid_constant__ loramux::ExpandArgs args) {                                \
    loramux::expand<loramux::type>(args);                                                     \
  }                                                                                           \
  extern "C" __device__ const int name##_shared = sizeof(loramux::Shared);
KERNEL(expand_bfloat16, BFloat16)
KERNEL(expand_float16, Float16)
