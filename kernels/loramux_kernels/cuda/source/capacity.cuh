// Which experts of a gate with a capacity take a token no more. Definition: gates.py, sequences.py.
#pragma once

#include "gate.cuh"

namespace loramux {

constexpr int PLACE_FIELDS = 3;  // sequences.py: earlier tokens of the request in the step, row to read, row to write

// Shared memory of a tile of `TOKENS`.
template <int TOKENS>
struct Room {
  u32 full[TOKENS];         // the result: a bit per expert that has no room for the token
  u32 chosen[TOKENS];       // a bit per expert that a token selects
  int before[MAX_EXPERTS];  // how many earlier tokens than the tile's selected it, in the sequence of its first one
  int open;                 // whether some expert has room after these
};

// What each of `count` tokens selects, by a team.
template <int TOKENS, int TEAM, typename Logit>
__device__ __forceinline__ void select_all(const Rule& rule, const Logit& logit, const int* ids, int count, int thread,
                                           u32* chosen) {
  const int lane = threadIdx.x % WARP, first = lane % GATE_LANES * MINE;
#pragma unroll 1
  for (int token = thread / GATE_LANES; token < TOKENS; token += TEAM / GATE_LANES) {
    const bool real = token < count;
    const Choice choice = choose(rule, logit, real ? __ldg(ids + token) : 0, real, TraceRows{nullptr, 0});
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < MINE; ++j) bits |= real && choice.selected[j] ? 1u << (first + j) : 0u;
#pragma unroll
    for (int step = 1; step < GATE_LANES; step *= 2) bits |= __shfl_xor_sync(ALL, bits, step);
    if (lane % GATE_LANES == 0) chosen[token] = bits;
  }
}

// room.full of a tile's `count` tokens, by a whole block of `THREADS`. `ids`: their rows, behind those of the tokens that
// come before them in the plan; `counts`: of the slice. `keep`: leave there what the next step goes on from.
template <int TOKENS, int THREADS, typename Logit>
__device__ void limit(const Rule& rule, const Logit& logit, const int* places, int* counts, const int* ids, int count,
                      Room<TOKENS>& room, bool keep) {
  const int thread = threadIdx.x, experts = rule.experts, capacity = static_cast<int>(rule.packed[LORAMUX_GATE_CAPACITY]);
  // The tile's first token may go on with a request of earlier tiles: those of its tokens are counted here once more,
  // until no expert has room.
  const int* first = places + PLACE_FIELDS * __ldg(ids);
  const int ahead = __ldg(first), first_read = __ldg(first + 1);
  if (thread < MAX_EXPERTS)
    room.before[thread] = ahead > 0 && first_read >= 0 && thread < experts ? counts[first_read * experts + thread] : 0;
  for (int done = 0; done < ahead; done += TOKENS) {
    const int others = min(TOKENS, ahead - done);
    select_all<TOKENS, THREADS>(rule, logit, ids - ahead + done, others, thread, room.chosen);
    __syncthreads();
    if (thread < WARP) {
      int before = thread < MAX_EXPERTS ? room.before[thread] : 0;
      for (int i = 0; i < others; ++i) before += room.chosen[i] >> (thread % MAX_EXPERTS) & 1;
      if (thread < MAX_EXPERTS) room.before[thread] = before;
      const bool open = __any_sync(ALL, thread < experts && before < capacity);
      if (thread == 0) room.open = open;
    }
    __syncthreads();
    if (!room.open) break;
  }
  select_all<TOKENS, THREADS>(rule, logit, ids, count, thread, room.chosen);
  __syncthreads();
#pragma unroll 1
  for (int pair = thread; pair < TOKENS * MAX_EXPERTS; pair += THREADS) {
    const int token = pair / MAX_EXPERTS, e = pair % MAX_EXPERTS;
    const bool real = token < count && e < experts;
    const int* place = places + PLACE_FIELDS * (real ? __ldg(ids + token) : 0);
    const int begin = token - (real ? __ldg(place) : 0), read = real ? __ldg(place + 1) : -1;
    // Only the request of the tile's first token can have begun before the tile.
    int before = begin < 0 ? room.before[e] : read >= 0 ? counts[read * experts + e] : 0;
    for (int i = max(begin, 0); i < token; ++i) before += room.chosen[i] >> e & 1;
    const u32 full = __ballot_sync(ALL, before >= capacity);
    if (e == 0) room.full[token] = full >> (threadIdx.x % WARP) & 0xffff;
    const int write = real && keep ? __ldg(place + 2) : -1;
    if (write >= 0) counts[write * experts + e] = before + (room.chosen[token] >> e & 1);
  }
  __syncthreads();
}

}  // namespace loramux
