// What a kernel must not do, one fault per number; test_emulator.py has their names. Without a fault all of it is in
// order: case NONE.

#include "ptx.cuh"

namespace loramux {

struct FaultArgs {
  int* memory;  // 64 words: [0] a counter, from [16] on one word per thread
  int which, odd;
};

enum Fault {
  NONE,
  NO_BARRIER,
  NO_WARP_BARRIER,
  DIVERGENT_BARRIER,
  DIVERGENT_EXCHANGE,
  PART_OF_A_WARP,
  UNWRITTEN_SHARED,
  BEYOND_SHARED,
  BEYOND_MEMORY,
  BEYOND_AN_ARRAY,
  NOT_ALIGNED,
  NO_WAIT,
  WAIT_TOO_SHORT,
  NO_COMMIT,
  COPY_OF_ANOTHER_LANE,
  COPY_TOO_EARLY,
  NO_END_OF_COPIES,
  NO_RELEASE,
  NO_ACQUIRE,
  SAME_WORD,
  STALE_CACHE,
};

struct Shared {
  Vector target[2][WARP];
  int words[WARP], last;
};

// Words in shared memory from lane to lane, once through a barrier and once through the warp.
__device__ void pass_on(const FaultArgs& args, Shared& shared) {
  const int lane = threadIdx.x, next = (lane + 1) % WARP;
  if (lane != 5 || args.which != UNWRITTEN_SHARED) shared.words[lane % WARP] = lane;
  if (args.which != NO_BARRIER && (args.which != DIVERGENT_BARRIER || lane < 7)) __syncthreads();
  args.memory[16 + lane % WARP] = shared.words[next];
  __syncthreads();
  if (lane < WARP) {
    shared.words[lane] = 2 * lane;
    if (args.which != NO_WARP_BARRIER) __syncwarp();
    args.memory[16 + lane] += shared.words[next];
  }
}

__device__ void exchange(const FaultArgs& args) {
  const int lane = threadIdx.x % WARP;
  const u32 mask = args.which == PART_OF_A_WARP ? 0xffffu : ALL;
  if (args.which == DIVERGENT_EXCHANGE && lane == 3)
    __ballot_sync(ALL, 1);
  else
    args.memory[16 + lane] += __shfl_sync(mask, lane, 0);
}

__device__ void touch(const FaultArgs& args, unsigned char* dynamic) {
  const int lane = threadIdx.x;
  int few[4] = {1, 2, 3, 4};
  if (args.which == BEYOND_SHARED) dynamic[sizeof(Shared) + 16] = 1;
  if (args.which == BEYOND_MEMORY) args.memory[64 + lane] = 1;
  if (args.which == BEYOND_AN_ARRAY) args.memory[16 + lane] = few[args.odd + 3];
  if (args.which == NOT_ALIGNED) load(reinterpret_cast<const element*>(args.memory + args.odd), true);
}

__device__ void copy_both(const FaultArgs& args, Shared& shared) {
  const int lane = threadIdx.x % WARP, other = args.which == COPY_OF_ANOTHER_LANE ? lane ^ 1 : lane;
  if (args.which == COPY_TOO_EARLY) shared.target[0][lane ^ 1] = Vector{};
  copy_cached(&shared.target[0][lane], args.memory + 4);
  if (args.which != NO_COMMIT) commit();
  copy(&shared.target[1][lane], args.memory + 8, false);
  commit();
  if (args.which == NO_END_OF_COPIES) return;
  if (args.which == NO_COMMIT || args.which == WAIT_TOO_SHORT)
    wait<1>();
  else if (args.which != NO_WAIT)
    wait<0>();
  args.memory[16 + lane] += static_cast<int>(shared.target[args.which == WAIT_TOO_SHORT][other].words[0]);
  wait<0>();
}

// Every block leaves a word per lane; the last one reads them all.
__device__ void meet(const FaultArgs& args, Shared& shared) {
  const int lane = threadIdx.x;
  int* mine = args.memory + 16 + (args.which == SAME_WORD ? 0 : 8 * blockIdx.x) + lane % 8;
  if (lane < 8) *mine = lane;
  if (args.which != NO_RELEASE) __threadfence();
  __syncthreads();
  if (lane == 0) shared.last = atomicAdd(args.memory, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (!shared.last) return;
  if (args.which != NO_ACQUIRE) __threadfence();
  const int* theirs = args.memory + 16 + lane % 16;
  const int got = args.which == STALE_CACHE ? __ldg(theirs) : __ldcg(theirs);
  __syncthreads();
  if (lane < 16) args.memory[48 + lane] = got;
}

__device__ void fault(const FaultArgs& args) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (gridDim.x == 1) {
    pass_on(args, shared);
    __syncthreads();
    exchange(args);
    touch(args, memory);
    copy_both(args, shared);
  } else {
    meet(args, shared);
  }
}

}  // namespace loramux

#define KERNEL(name)                                                                                      \
  extern "C" __global__ void name(const __grid_constant__ loramux::FaultArgs args) { loramux::fault(args); } \
  extern "C" __device__ const int name##_shared = sizeof(loramux::Shared);
KERNEL(fault_bfloat16)
KERNEL(fault_float16)
