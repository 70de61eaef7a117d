// h_TR = x_TI @ A_RIᵀ for every tile of up to 64 tokens, in one launch.
//
// A cluster of eight thread blocks owns a tile and a group of up to 128 rows of A; each block takes an eighth of I.
// Operands go from memory to registers as in shrink_decode.cu. The blocks' sums meet in the cluster's shared memory and
// are added in a fixed order, so h has one plane.

#include "sums.cuh"

namespace loramux {

constexpr int CLUSTER = 8, WARPS = 8, THREADS = WARPS * WARP, GROUP_ROWS = WARPS * MMA_ROWS;
constexpr int TILES = 8, TOKENS = 8 * TILES, DEPTH = 3;  // groups of eight tokens; chunks whose loads are in flight

struct ShrinkArgs {
  const element* x;
  const element* weights;
  const i64* table;
  const int* count;  // tiles of the step; none if negative
  const int* tiles;
  const int* token_ids;
  float* h;
  i64 x_stride, table_stride, h_stride;
  int d_in, groups;
};

// Mean and variance of x for the routers that read LayerNorm(x), behind the sums of the tiles that this cluster had: its
// warps take a token each. Afterwards, in a loop of its own, so that the products have the registers for themselves.
template <typename T>
__device__ __forceinline__ void moments_of_tiles(const ShrinkArgs& args, int tiles, int lanes, int clusters, int part) {
  for (int item = blockIdx.x / CLUSTER; item < tiles * lanes; item += clusters) {
    if (item % lanes != 0) continue;
    const Tile tile = read_tile(args.tiles, item / lanes);
    const i64* row = args.table + tile.slot * args.table_stride;
    if (row[MOMENTS] == 0) continue;
    const Inputs in{args.x, args.x_stride, args.token_ids + tile.start, tile.count, args.d_in};
    for (int token = part * WARPS + threadIdx.x / WARP; token < tile.count; token += CLUSTER * WARPS)
      moments<T>(in, token, args.h + __ldg(in.ids + token) * args.h_stride + static_cast<int>(row[ROWS]));
  }
}

template <typename T>
__device__ __forceinline__ void shrink(const ShrinkArgs& args) {
  __shared__ float partial[WARPS][TOKENS][PITCH];
  const int part = cluster_rank();
  const int warp = threadIdx.x / WARP;
  const int tiles = *args.count, clusters = gridDim.x / CLUSTER, chunks = blocks_of(args.d_in, CHUNK);
  if (tiles <= 0) return;
  // With few tiles several clusters share one and take every `lanes`th group of its rows.
  const int lanes = max(min(clusters / tiles, args.groups), 1);
  bool normed = false;  // whether a router of these tiles reads LayerNorm(x)
  for (int item = blockIdx.x / CLUSTER; item < tiles * lanes; item += clusters) {
    const Tile tile = read_tile(args.tiles, item / lanes);
    const i64* row = args.table + tile.slot * args.table_stride;
    const int all_rows = static_cast<int>(row[ROWS]);
    normed |= row[MOMENTS] != 0;
    const element* a = args.weights + row[A_OFFSET];
    const Inputs in{args.x, args.x_stride, args.token_ids + tile.start, tile.count, args.d_in};
    // The bands are read again where they are needed: in the products' loop there is no register to keep them in.
    for (int band = 0; band < static_cast<int>(__ldg(row + BANDS)); ++band) {
      for (int first = item % lanes * GROUP_ROWS; first < all_rows; first += lanes * GROUP_ROWS) {
        const int rows = min(all_rows - first, GROUP_ROWS), blocks = blocks_of(rows, MMA_ROWS);
        // Fewer blocks of rows than warps: several warps share a block and take pieces of the inputs.
        const int sharing = blocks > 4 ? 1 : blocks > 2 ? 2 : blocks > 1 ? 4 : 8;
        const int block = warp / sharing, piece = warp % sharing;
        if (block < blocks) {
          const int share = in_band(chunks, static_cast<int>(__ldg(row + BANDS)));
          const int part_begin = share * band + share * part / CLUSTER;
          const int part_end = share * band + share * (part + 1) / CLUSTER;
          const int begin = part_begin + (part_end - part_begin) * piece / sharing;
          const int end = part_begin + (part_end - part_begin) * (piece + 1) / sharing;
          const element* mine = a + static_cast<i64>(first + block * MMA_ROWS) * args.d_in;
          sums<T, TILES, DEPTH>(in, mine, rows - block * MMA_ROWS, begin, end, partial[warp]);
        }
        cluster_barrier();
        for (int i = part * THREADS + threadIdx.x; i < blocks * TOKENS * MMA_ROWS; i += CLUSTER * THREADS) {
          const int b = i / (TOKENS * MMA_ROWS), token = i / MMA_ROWS % TOKENS, r = b * MMA_ROWS + i % MMA_ROWS;
          if (token >= tile.count || r >= rows) continue;
          float sum = 0;
          for (int p = 0; p < sharing; ++p)
  #pragma unroll
            for (int c = 0; c < CLUSTER; ++c) sum += load_of(&partial[b * sharing + p][token][i % MMA_ROWS], c);
          args.h[__ldg(args.token_ids + tile.start + token) * args.h_stride + band * all_rows + first + r] = sum;
        }
        cluster_barrier();  // nobody overwrites or leaves what others still read
      }
    }
  }
  if (normed) moments_of_tiles<T>(args, tiles, lanes, clusters, part);
}

}  // namespace loramux

#define KERNEL(name, type)                                                                                \
  extern "C" __global__ void __cluster_dims__(loramux::CLUSTER, 1, 1) __launch_bounds__(loramux::THREADS) \
      name(const __grid_constant__ loramux::ShrinkArgs args) {                                            \
    loramux::shrink<loramux::type>(args);                                                                 \
  }
KERNEL(shrink_bfloat16, BFloat16)
KERNEL(shrink_float16, Float16)
