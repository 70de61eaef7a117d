// CUDA C++'s words for g++: what the kernels' sources use of the language and of its built-in functions.
#pragma once

#include <cmath>
#include <cstring>

#include "machine.hpp"

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One instance per block: the machine gives each block its own contents of what this thread owns.
#define __shared__ thread_local

#define threadIdx (machine::thread_index())
#define blockIdx (machine::block_index())
#define gridDim (machine::grid_size())

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

template <typename To, typename From>
inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}

inline float __int_as_float(int v) { return bits_as<float>(v); }
inline float __uint_as_float(unsigned v) { return bits_as<float>(v); }
inline unsigned __float_as_uint(float v) { return bits_as<unsigned>(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned v = 0;
  for (int i = 0; i < 4; ++i) v |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return v;
}

inline void __syncthreads() { machine::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { machine::exchange(machine::Op::SYNC, mask, 0, 0); }
inline void __threadfence() { machine::fence(); }
inline bool __any_sync(unsigned mask, int v) { return machine::exchange(machine::Op::BALLOT, mask, v != 0, 0) != 0; }
inline unsigned __ballot_sync(unsigned mask, int v) { return machine::exchange(machine::Op::BALLOT, mask, v != 0, 0); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) { return machine::exchange(machine::Op::OR, mask, v, 0); }

template <typename T>
inline T __shfl_sync(unsigned mask, T v, int lane) {
  return bits_as<T>(machine::exchange(machine::Op::LANE, mask, bits_as<unsigned>(v), lane));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T v, int lanes) {
  return bits_as<T>(machine::exchange(machine::Op::XOR, mask, bits_as<unsigned>(v), lanes));
}

template <typename T>
inline T __ldg(const T* p) {
  T v;
  machine::read_only(p, sizeof v, &v);
  return v;
}
template <typename T>
inline T __ldcg(const T* p) {
  T v;
  machine::read(p, sizeof v, &v);
  return v;
}

inline int atomicAdd(int* p, int v) { return static_cast<int>(machine::atomic(p, machine::Atomic::ADD, v)); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return machine::atomic(p, machine::Atomic::OR, v); }
