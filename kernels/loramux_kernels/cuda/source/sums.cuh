// The inner product of both shrinks: rows of A with tokens of one tile, by one warp.
#pragma once

#include "common.cuh"

namespace loramux {

constexpr int PITCH = 20;  // floats between tokens in shared memory: 16 rows, padded so that lanes hit distinct banks

// x of a tile: the tokens' rows of x are `ids`, of which there are `count`, `stride` apart.
struct Inputs {
  const element* x;
  i64 stride;
  const int* ids;
  int count, d_in;
};

// Mean and variance of x of the tile's `token` to `out` and the element behind it, by one warp. The squares are those
// around the mean: less the mean's, those of x would cancel where it is large.
template <typename T>
__device__ __forceinline__ void moments(const Inputs& in, int token, float* out) {
  const int lane = threadIdx.x % WARP;
  const element* x = in.x + __ldg(in.ids + token) * in.stride;
  float mean = 0, variance = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    float total = 0;
#pragma unroll 1
    for (int i = 8 * lane; i < in.d_in; i += 8 * WARP) {
      const Vector v = load(x + i, true);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float low = T::low(v.words[q]) - mean, high = T::high(v.words[q]) - mean;
        total += pass == 0 ? low + high : low * low + high * high;
      }
    }
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) total += __shfl_xor_sync(ALL, total, step);
    (pass == 0 ? mean : variance) = total / in.d_in;
  }
  if (lane == 0) out[0] = mean, out[1] = variance;
}

// This warp's sums of 16 rows of A from `a` on (`rows` of them exist) with TILES groups of eight tokens, over chunks
// [begin, end), into out[token][row]. DEPTH: chunks whose loads are in flight together.
template <typename T, int TILES, int DEPTH>
__device__ __forceinline__ void sums(const Inputs& in, const element* a, int rows, int begin, int end,
                                     float (*out)[PITCH]) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const element* a_low = a + static_cast<i64>(g) * in.d_in + 8 * t;
  const element* a_high = a_low + 8 * static_cast<i64>(in.d_in);
  const bool low = g < rows, high = g + 8 < rows;
  const element* xs[TILES];
  bool live[TILES];
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    const int i = n * 8 + g;
    live[n] = i < in.count;
    xs[n] = in.x + (live[n] ? __ldg(in.ids + i) * in.stride : 0) + 8 * t;
  }
  float acc[TILES][4] = {};
  for (int chunk = begin; chunk < end; chunk += DEPTH) {
    Vector wl[DEPTH], wh[DEPTH], v[DEPTH][TILES];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int i = (chunk + d) * CHUNK;
      const bool inside = chunk + d < end && i + 8 * t < in.d_in;
      wl[d] = load_weights(a_low + i, inside && low);
      wh[d] = load_weights(a_high + i, inside && high);
#pragma unroll
      for (int n = 0; n < TILES; ++n) v[d][n] = load(xs[n] + i, inside && live[n]);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int k = 0; k < 4; k += 2)
          T::mma(acc[n], wl[d].words[k], wh[d].words[k], wl[d].words[k + 1], wh[d].words[k + 1], v[d][n].words[k],
                 v[d][n].words[k + 1]);
  }
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    float(*to)[PITCH] = out + n * 8 + 2 * t;
    to[0][g] = acc[n][0];
    to[1][g] = acc[n][1];
    to[0][g + 8] = acc[n][2];
    to[1][g + 8] = acc[n][3];
  }
}

}  // namespace loramux
