// g_TE = gate(l_TE) of one tile, by one team of threads; g_TG where experts are grouped. Definition: gates.py.
#pragma once

#include "common.cuh"

namespace loramux {

enum GateFlags {
  ABSOLUTE = 1, RENORMALISE = 2, ONE = 4, GROUPED = 8, ADAPTIVE = 16, LIMITED = 32, LAYER_NORM = 64  // gates.py
};

// Where a step's router logits are kept when somebody asks (trace.py), or null.
struct TraceRows {
  float* logits;
  int tokens;
};

constexpr int GATE_LANES = 8;  // lanes that share a token
constexpr int MINE = MAX_EXPERTS / GATE_LANES;  // experts of a lane

// A gate as the table has it.
struct Rule {
  const i64* packed;
  int experts, k, flags;
  float p_sum, threshold, eps, temperature, bias;

  __device__ __forceinline__ Rule(const i64* packed, int experts)
      : packed(packed),
        experts(experts),
        k(static_cast<int>(packed[0])),
        flags(static_cast<int>(packed[1])),
        p_sum(real(packed[2])),
        threshold(real(packed[3])),
        eps(real(packed[4])),
        temperature(real(packed[5])),
        bias(real(packed[6])) {}

  static __device__ __forceinline__ float real(i64 bits) { return __int_as_float(static_cast<int>(bits)); }
};

// A logit of LayerNorm(x) from that of x, its router row's sum, and mean and variance of x.
__device__ __forceinline__ float normalised(const Rule& rule, float logit, float sum, float mean, float variance) {
  return __fdiv_rn(logit - mean * sum, sqrtf(variance + Rule::real(rule.packed[7])));
}

// This lane's experts for one token: which are selected, and their weights before these are divided.
struct Choice {
  float p[MINE];
  bool selected[MINE];
};

__device__ __forceinline__ float over_token(float v, bool largest) {
#pragma unroll
  for (int step = 1; step < GATE_LANES; step *= 2) {
    const float other = __shfl_xor_sync(ALL, v, step);
    v = largest ? fmaxf(v, other) : v + other;
  }
  return v;
}

// `logit(id, n)` reads the n-th logit of the token whose row of h is `id`.
template <typename Logit>
__device__ __forceinline__ Choice choose(const Rule& rule, const Logit& logit, int id, bool real, TraceRows trace) {
  const float infinity = __int_as_float(0x7f800000);
  const int lane = threadIdx.x % WARP, first = lane % GATE_LANES * MINE, experts = rule.experts;
  const int logits = experts + (rule.flags & ADAPTIVE ? 1 : 0);
  Choice choice;
  float (&p)[MINE] = choice.p;
  float largest = -infinity, sum = 0, own = 0;
#pragma unroll
  for (int j = 0; j < MINE; ++j) {
    const int e = first + j;
    const bool live = real && e < logits;
    // What the shrink did not write may hold anything: it is replaced, never multiplied.
    const float score = live ? logit(id, e) : 0.f;
    if (trace.logits != nullptr && live && id < trace.tokens) trace.logits[id * MAX_EXPERTS + e] = score;
    own += e == experts ? score : 0.f;
    p[j] = e < experts ? __fdiv_rn(rule.flags & ABSOLUTE ? fabsf(score) : score, rule.temperature) : -infinity;
    largest = fmaxf(largest, p[j]);
  }
  largest = over_token(largest, true);
#pragma unroll
  for (int j = 0; j < MINE; ++j) sum += p[j] = expf(p[j] - largest);
  sum = over_token(sum, false);
  // Rounded as on the host: ten equal scores reach a threshold of 0.1.
#pragma unroll
  for (int j = 0; j < MINE; ++j) p[j] = __fdiv_rn(p[j], sum);
  // How many experts come before each, and their probability together.
  int place[MINE] = {};
  float mass[MINE] = {};
#pragma unroll
  for (int o = 0; o < MAX_EXPERTS; ++o) {
    const float other = __shfl_sync(ALL, p[o % MINE], lane / GATE_LANES * GATE_LANES + o / MINE);
    if (o >= experts) continue;
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
      const bool before = other > p[j] || (other == p[j] && o < first + j);
      place[j] += before;
      mass[j] += before ? other : 0.f;
    }
  }
  // What p must reach, and what is taken off it: for an adaptive gate the threshold of this token.
  float least = rule.threshold, taken_off = 0;
  if (rule.flags & ADAPTIVE) {
    own = over_token(own, false) + rule.bias;
    // One quotient: a product would be fused with what it is taken off, and differ from what p was compared with.
    taken_off = least = __fdiv_rn(rule.threshold, 1.f + expf(-own));
  }
#pragma unroll
  for (int j = 0; j < MINE; ++j) {
    choice.selected[j] = first + j < experts && place[j] < rule.k && mass[j] < rule.p_sum && p[j] >= least;
    p[j] -= taken_off;
  }
  return choice;
}

// Weights into gates[token][expert] of `TOKENS` tokens, of which `count` exist, by a team of `TEAM` threads of which this
// is `thread`; returns a bit per expert or group that any token of this warp takes. `ids`: the tokens' rows of h.
// `full`: for a gate with a capacity, a bit per expert that takes the token no more.
template <int TOKENS, int TEAM, typename Logit>
__device__ u32 gate(const Rule& rule, const Logit& logit, const int* ids, int count, int thread,
                    float (*gates)[MAX_EXPERTS], const u32* full, TraceRows trace) {
  const int lane = threadIdx.x % WARP, first = lane % GATE_LANES * MINE;
  u32 taken = 0;
#pragma unroll
  for (int token = thread / GATE_LANES; token < TOKENS; token += TEAM / GATE_LANES) {
    const bool real = token < count;
    const int id = real ? __ldg(ids + token) : 0;
    const Choice choice = choose(rule, logit, id, real, trace);
    float total = 0;
#pragma unroll
    for (int j = 0; j < MINE; ++j) total += choice.selected[j] ? choice.p[j] : 0.f;
    total = over_token(total, false);
    const float divisor = (rule.flags & RENORMALISE) && total > 0 ? total + rule.eps : 1.f;
    float g[MINE];
#pragma unroll
    for (int j = 0; j < MINE; ++j)
      g[j] = !choice.selected[j] ? 0.f : rule.flags & ONE ? 1.f : __fdiv_rn(choice.p[j], divisor);
    if (rule.flags & LIMITED) {
#pragma unroll
      for (int j = 0; j < MINE; ++j) g[j] = full[token] >> (first + j) & 1 ? 0.f : g[j];
    }
    if (rule.flags & GROUPED) {
      // Rank rows belong to groups of experts: group i takes the weights of the experts in its 16 bits.
      float of_group[MINE] = {};
#pragma unroll
      for (int o = 0; o < MAX_EXPERTS; ++o) {
        const float other = __shfl_sync(ALL, g[o % MINE], lane / GATE_LANES * GATE_LANES + o / MINE);
#pragma unroll
        for (int j = 0; j < MINE; ++j) {
          const int group = first + j;
          of_group[j] += rule.packed[LORAMUX_GATE_GROUPS + group / 4] >> (group % 4 * 16 + o) & 1 ? other : 0.f;
        }
      }
#pragma unroll
      for (int j = 0; j < MINE; ++j) g[j] = of_group[j];
    }
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
      gates[token][first + j] = g[j];
      taken |= real && g[j] > 0 ? 1u << (first + j) : 0u;
    }
  }
  return __reduce_or_sync(ALL, taken);
}

}  // namespace loramux
