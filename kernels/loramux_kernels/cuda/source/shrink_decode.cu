// h_TR = x_TI @ A_RIᵀ for every tile of up to 16 tokens, and from it the left operands of the expand, in one launch.
//
// A thread block takes a unit: 16 rows of A for one tile and one piece of I; its eight warps share the piece. Operands
// go from memory to registers and never through shared memory: lane 4g + t reads 16 bytes of row g at element 8t of a
// chunk of 32, for A and x alike, so that both sides of every product hold the same inputs in the same places. The
// block that finishes a tile's last unit adds the pieces, computes the gate and hands over. Sums are added in an order
// that depends on the site alone; the one atomic operation only counts finished units.

#include "capacity.cuh"
#include "handoff.cuh"
#include "sums.cuh"

namespace loramux {

constexpr int WARPS = 8, THREADS = WARPS * WARP, TEAM = THREADS / 2;
constexpr int MAX_PLANES = 4;
constexpr i64 PREFETCHED = 24 << 20;  // bytes of one site's B that may wait in the L2 cache of 50 MB

struct ShrinkArgs {
  const element* x;
  const element* weights;
  const float* floats;
  const int* ints;
  const i64* table;
  const int* count;  // tiles of the step; none if negative
  const int* tiles;
  const int* token_ids;
  float* h;  // one plane per piece of I
  Handoff* handoff;
  Left* left;
  int* finished;  // units of each tile: zero between launches
  float* trace;
  const int* trace_flag;
  const int* places;
  int* counts;  // the ints, to be written
  i64 x_stride, table_stride, h_stride, plane_stride;
  int d_in, planes, first_gate, traced, slices, widths[MAX_SLICES];
};

struct Shared {
  i64 row[HEAD + PART * MAX_SLICES];  // of the table, for the tile's adapter
  float partial[WARPS][MMA_ROWS][PITCH];
  float gates[MAX_SLICES][MMA_ROWS][MAX_EXPERTS];
  u32 taken[MAX_SLICES];
  u32 masks[MAX_SLICES][MAX_BLOCKS];
  Room<MMA_ROWS> room[MAX_SLICES];
  int next;            // the block's next item
  int last, from, to;  // whether the tiles from … to have all their units, and these tiles
};

// Scales and experts of an adapter, and part `part` of `parts` of its B, into the L2 cache, for the hand-over and for the
// expand.
__device__ __forceinline__ void prefetch(const ShrinkArgs& args, const i64* row, int part, int parts, int tiles) {
  i64 begin = 0, bytes = 0, rows = 0;
  for (int j = 0; j < args.slices; ++j) {
    const i64 rank = row[HEAD + PART * j + RANK];
    if (rank > 0 && bytes == 0) begin = row[HEAD + PART * j + B_OFFSET] * static_cast<i64>(sizeof(element));
    bytes += rank * args.widths[j] * static_cast<i64>(sizeof(element));
    rows += rank;
  }
  const int line = threadIdx.x * 32;  // of 32 words
  if (line < rows) {
    prefetch_line(args.floats + row[SCALE_OFFSET] + line);
    prefetch_line(args.ints + row[EXPERT_OFFSET] + line);
  }
  if (threadIdx.x != 0 || tiles * bytes > PREFETCHED) return;
  // From the first slice's B on; with multipliers and biases between slices, the end of the last one is left out.
  const i64 share = (bytes / parts + 127) / 128 * 128, first = share * part;
  const i64 length = min(share, bytes - first) / 16 * 16;
  if (length > 0) prefetch_range(reinterpret_cast<const char*>(args.weights) + begin + first, static_cast<u32>(length));
}

// One column of h for the token whose row is `id`: the planes in order. Other blocks wrote them: past the nearest cache.
__device__ __forceinline__ float sum_planes(const ShrinkArgs& args, int id, int column) {
  const float* p = args.h + id * args.h_stride + column;
  float plane[MAX_PLANES], sum = 0;
#pragma unroll
  for (int i = 0; i < MAX_PLANES; ++i) plane[i] = i < args.planes ? __ldcg(p + i * args.plane_stride) : 0.f;
#pragma unroll
  for (int i = 0; i < MAX_PLANES; ++i) sum += plane[i];
  return sum;
}

// The e-th logit of a slice's token.
__device__ __forceinline__ float read_logit(const ShrinkArgs& args, const Shared& shared, const Slice& s,
                                            const Rule& rule, int id, int e) {
  const float logit = sum_planes(args, id, static_cast<int>(s.part[LOGITS]) + e);
  if (!(rule.flags & LAYER_NORM)) return logit;
  const float* moments = args.h + id * args.h_stride + shared.row[ROWS];
  return normalised(rule, logit, __ldg(args.floats + s.part[SUMS] - 1 + e), __ldcg(moments), __ldcg(moments + 1));
}

// Bits of the rank rows that some token takes, per block of 16, for the slices that have a gate.
__device__ __forceinline__ void mark_rows(const ShrinkArgs& args, Shared& shared) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  for (int j = 0; j < args.slices; ++j) {
    const Slice s(shared.row, j, args.floats, args.ints);
    if (s.experts == 0) continue;
    for (int first = warp * WARP; first < MAX_BLOCKS * MMA_ROWS; first += THREADS) {
      const int r = first + lane;
      const bool use = r < s.rank && (shared.taken[j] >> __ldg(s.expert_of + r) & 1);
      const u32 bits = __ballot_sync(ALL, use);
      if (lane % MMA_ROWS == 0) shared.masks[j][r / MMA_ROWS] = bits >> lane & 0xffff;
    }
  }
}

// The whole block: which experts still take a tile's tokens.
__device__ __forceinline__ void limit_slices(const ShrinkArgs& args, Shared& shared, const int* ids, int count) {
  for (int j = 0; j < args.slices; ++j) {
    const Slice s(shared.row, j, args.floats, args.ints);
    const Rule rule(s.part + RULE, s.experts);
    if (!(rule.flags & LIMITED)) continue;
    const auto logit = [&](int id, int e) { return read_logit(args, shared, s, rule, id, e); };
    int* counts = args.counts + s.part[COUNTS] - 1;
    limit<MMA_ROWS, THREADS>(rule, logit, args.places, counts, ids, count, shared.room[j], true);
  }
}

// The whole block: h of a tile, now complete, into what the expand reads.
template <typename T, bool COUNTING>
__device__ __forceinline__ void hand_over(const ShrinkArgs& args, const Tile& tile, int index, Shared& shared) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const int* ids = args.token_ids + tile.start;
  bool mixture = false;
  for (int j = 0; j < args.slices; ++j) mixture |= shared.row[HEAD + PART * j + EXPERTS] > 0;
  if (mixture) {
    const bool tracing = *args.trace_flag != 0;
    if (threadIdx.x < MAX_SLICES) shared.taken[threadIdx.x] = 0;
    __syncthreads();
    if (COUNTING) limit_slices(args, shared, ids, tile.count);
    // Two slices at a time, by half of the block each.
    for (int j = threadIdx.x / TEAM; j < args.slices; j += THREADS / TEAM) {
      const Slice s(shared.row, j, args.floats, args.ints);
      if (s.experts == 0) continue;
      float* kept = args.trace + static_cast<i64>(args.first_gate + j) * args.traced * MAX_EXPERTS;
      const Rule rule(s.part + RULE, s.experts);
      const u32 taken = gate<MMA_ROWS, TEAM>(
          rule, [&](int id, int e) { return read_logit(args, shared, s, rule, id, e); }, ids, tile.count,
          threadIdx.x % TEAM, shared.gates[j], shared.room[j].full, TraceRows{tracing ? kept : nullptr, args.traced});
      if (lane == 0) atomicOr(&shared.taken[j], taken);
    }
    __syncthreads();
    mark_rows(args, shared);
    __syncthreads();
  }
  for (int j = 0, n = 0; j < args.slices; ++j) {
    const Slice s(shared.row, j, args.floats, args.ints);
    const int share = blocks_of(s.rank, MMA_ROWS), at = place(index, args.slices, j);
    const int blocks = share * static_cast<int>(shared.row[BANDS]), rows_of_a = static_cast<int>(shared.row[ROWS]);
    Handoff& handoff = args.handoff[at];
    for (int block = 0; block < blocks; ++block, ++n) {
      if (n % WARPS != warp || (s.experts > 0 && shared.masks[j][block] == 0)) continue;
      int to = block;
      if (s.experts > 0)
        for (int before = 0; before < block; ++before) to -= shared.masks[j][before] == 0;
      const int band = share == blocks ? 0 : block / share, shift = band * rows_of_a, own = block - band * share;
      const Rows rows(s, own, s.experts > 0 ? shared.taken[j] : ALL, shift);
      float v[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool live = 8 * i + g < tile.count;
        const int id = live ? __ldg(ids + 8 * i + g) : 0;
        const int column = shift + s.first_row + own * MMA_ROWS + 4 * t;
#pragma unroll
        for (int q = 0; q < 4; ++q) v[i][q] = live && rows.use[q] ? sum_planes(args, id, column + q) : 0.f;
      }
      Vector left;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float weight = s.experts > 0 ? shared.gates[j][8 * i + g][rows.expert[q]] : 1.f;
          // What no gate selects may hold anything: replaced, never multiplied.
          v[i][q] = weight != 0.f ? v[i][q] * rows.factor[q] * weight : 0.f;
        }
        left.words[i] = T::pack(v[i][0], v[i][1]);
        left.words[2 + i] = T::pack(v[i][2], v[i][3]);
      }
      args.left[static_cast<i64>(at) * MAX_BLOCKS + to][lane] = left;
      if (lane == 0) handoff.rows[to] = static_cast<u32>(own) | rows.mask << 16;
    }
    if (warp == j % WARPS) {
      if (lane < MMA_ROWS) handoff.ids[lane] = lane < tile.count ? __ldg(ids + lane) : -1;
      const bool takes = lane < blocks && (s.experts == 0 || shared.masks[j][min(lane, MAX_BLOCKS - 1)] != 0);
      const int live_blocks = __popc(__ballot_sync(ALL, takes));
      if (lane == 0) {
        handoff.b = s.part[B_OFFSET];
        handoff.outputs = {s.part[MAG], s.part[BIAS]};
        handoff.bands = static_cast<int>(shared.row[BANDS]);
        handoff.blocks = in_band(live_blocks, handoff.bands);
      }
    }
  }
}

// The same for the tiles from … to of an adapter with a capacity, whose tokens are counted in order. A function of its
// own, so that others have the registers for themselves.
template <typename T>
__device__ __noinline__ void hand_over_together(const ShrinkArgs& args, Shared& shared) {
  const int from = shared.from, to = shared.to;
  for (int i = from; i < to; ++i) {
    if (i > from) __syncthreads();
    hand_over<T, true>(args, read_tile(args.tiles, i), i, shared);
  }
}

// Whether the first token of a tile goes on with a request of the tile before.
__device__ __forceinline__ bool goes_on(const ShrinkArgs& args, int index) {
  return __ldg(args.places + PLACE_FIELDS * __ldg(args.token_ids + read_tile(args.tiles, index).start)) > 0;
}

template <typename T>
__device__ __forceinline__ void shrink(const ShrinkArgs& args) {
  __shared__ Shared shared;
  const int warp = threadIdx.x / WARP, blocks = gridDim.x;
  const int tiles = *args.count;
  if (tiles <= 0) return;
  // Several thread blocks share a tile and take every `lanes`th unit of it.
  const int lanes = max(blocks / tiles, 1), chunks = blocks_of(args.d_in, CHUNK), parts = args.planes * WARPS;
  for (int item = blockIdx.x; item < tiles * lanes; item = shared.next) {
    const int index = item / lanes, lane = item % lanes;
    const Tile tile = read_tile(args.tiles, index);
    const i64* row = args.table + tile.slot * args.table_stride;
    __syncthreads();  // the last hand-over may still read the row
    if (static_cast<int>(threadIdx.x) < HEAD + PART * args.slices) shared.row[threadIdx.x] = __ldg(row + threadIdx.x);
    if (threadIdx.x == 0) shared.next = item + blocks;  // kept here, as registers are short
    __syncthreads();
    const int rows = static_cast<int>(shared.row[ROWS]);
    const int bands = static_cast<int>(shared.row[BANDS]);
    const int units = blocks_of(rows, MMA_ROWS) * args.planes * bands;
    const element* a = args.weights + shared.row[A_OFFSET];
    const Inputs in{args.x, args.x_stride, args.token_ids + tile.start, tile.count, args.d_in};
    if (units == 0 && lane == 0) hand_over<T, false>(args, tile, index, shared);
    for (int unit = lane; unit < units; unit += lanes) {
      const int plane = unit % args.planes, part = plane * WARPS + warp, row_blocks = blocks_of(rows, MMA_ROWS);
      // Units of one band after those of another.
      const int band = bands > 1 ? unit / args.planes / row_blocks : 0;
      const int first = (unit / args.planes - band * row_blocks) * MMA_ROWS, share = in_band(chunks, bands);
      const int begin = band * share + share * part / parts, end = band * share + share * (part + 1) / parts;
      const element* mine = a + static_cast<i64>(first) * args.d_in;
      if (tile.count <= 8)
        sums<T, 1, 8>(in, mine, rows - first, begin, end, shared.partial[warp]);
      else
        sums<T, 2, 4>(in, mine, rows - first, begin, end, shared.partial[warp]);
      prefetch(args, shared.row, unit, units, tiles);
      // A router reads LayerNorm(x): the units share the tokens, a warp each.
      if (shared.row[MOMENTS] != 0)
        for (int token = unit * WARPS + warp; token < tile.count; token += units * WARPS)
          moments<T>(in, token, args.h + __ldg(in.ids + token) * args.h_stride + rows);
      __syncthreads();
      const int token = threadIdx.x / MMA_ROWS, r = threadIdx.x % MMA_ROWS;
      if (token < tile.count && first + r < rows) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += shared.partial[w][token][r];
        const i64 id = __ldg(args.token_ids + tile.start + token);
        args.h[plane * args.plane_stride + id * args.h_stride + band * rows + first + r] = sum;
      }
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        int from = index, to = index + 1;
        if (shared.row[COUNTED] != 0) {
          // Counting needs the logits of all tokens before: tiles that share a request are handed over together.
          while (from > 0 && goes_on(args, from)) --from;
          while (to < tiles && goes_on(args, to)) ++to;
        }
        shared.from = from;
        shared.to = to;
        shared.last = atomicAdd(args.finished + from, 1) == (to - from) * units - 1;
      }
      __syncthreads();
      if (!shared.last) continue;
      __threadfence();
      if (threadIdx.x == 0) args.finished[shared.from] = 0;
      if (shared.row[COUNTED] != 0)
        hand_over_together<T>(args, shared);
      else
        hand_over<T, false>(args, tile, index, shared);
      break;  // nobody has a unit of this tile left
    }
  }
}

}  // namespace loramux

#define KERNEL(name, type)                                                                             \
  extern "C" __global__ void __launch_bounds__(loramux::THREADS, 2)                                    \
      name(const __grid_constant__ loramux::ShrinkArgs args) {                                         \
    loramux::shrink<loramux::type>(args);                                                              \
  }
KERNEL(shrink_bfloat16, BFloat16)
KERNEL(shrink_float16, Float16)
