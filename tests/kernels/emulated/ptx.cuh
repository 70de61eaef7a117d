// Stands in for the kernels' header of the same name: its functions, on the machine of machine.hpp.
#pragma once

#include "cuda.hpp"
#include "types.cuh"

namespace loramux {

inline Vector load_weights(const element* p, bool live) {
  Vector v = {};
  if (live) machine::read_only(p, sizeof v, &v);
  return v;
}

inline Vector load(const element* p, bool live) {
  Vector v = {};
  if (live) machine::read(p, sizeof v, &v);
  return v;
}

inline void store(element* p, const Vector& v) { machine::write(p, sizeof v, &v); }

inline void copy(Vector* to, const void* from, bool live) { machine::copy(to, from, live); }
inline void copy_cached(Vector* to, const void* from) { machine::copy(to, from, true); }
inline void commit() { machine::commit(); }
template <int PENDING>
inline void wait() {
  machine::wait(PENDING);
}

inline void prefetch_line(const void* p) { machine::prefetch_line(p); }
inline void prefetch_range(const void* p, u32 bytes) { machine::prefetch_range(p, bytes); }

inline int cluster_rank() { return machine::cluster_rank(); }
inline void cluster_barrier() { machine::cluster_barrier(); }
inline float load_of(const float* mine, int rank) { return machine::load_of(mine, rank); }

struct BFloat16 {
  static void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    machine::mma(machine::Kind::BFLOAT16, d, {a0, a1, a2, a3}, {b0, b1});
  }
  static u32 pack(float low, float high) { return machine::pack(machine::Kind::BFLOAT16, low, high); }
  static float low(u32 v) { return machine::value(machine::Kind::BFLOAT16, v & 0xffff); }
  static float high(u32 v) { return machine::value(machine::Kind::BFLOAT16, v >> 16); }
};

struct Float16 {
  static void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    machine::mma(machine::Kind::FLOAT16, d, {a0, a1, a2, a3}, {b0, b1});
  }
  static u32 pack(float low, float high) { return machine::pack(machine::Kind::FLOAT16, low, high); }
  static float low(u32 v) { return machine::value(machine::Kind::FLOAT16, v & 0xffff); }
  static float high(u32 v) { return machine::value(machine::Kind::FLOAT16, v >> 16); }
};

}  // namespace loramux
