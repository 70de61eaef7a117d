// The types that memory, matrix products and tables are made of, and the size of a warp.
#pragma once

namespace loramux {

using u32 = unsigned int;
using i64 = long long;
using element = unsigned short;  // a bfloat16 or float16, by its bits

constexpr int WARP = 32;
constexpr u32 ALL = 0xffffffffu;

// 16 bytes: four registers of two elements each.
struct Vector {
  u32 words[4];
};

}  // namespace loramux
