// What the machine's parts share: threads, warps, blocks, and who runs now.
#pragma once

#include <csetjmp>
#include <memory>
#include <string>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

#include "machine.hpp"

namespace machine {

// READY includes: took a break.
enum class State { READY, IN_EXCHANGE, AT_BARRIER, AT_CLUSTER_BARRIER, DONE };

struct Copy {
  unsigned char* to;
  unsigned char bytes[16];
};

// Ends of phases of blocks, by block: everything that block did before.
using Ends = std::unordered_map<unsigned, unsigned>;

struct Block;

struct Fiber {
  ucontext_t birth;
  std::jmp_buf at;
  bool born = false;
  Block* block = nullptr;
  unsigned thread = 0;
  State state = State::DONE;
  // In an exchange.
  Op op;
  unsigned value, other;
  Kind kind;
  float* d;
  unsigned a[4], b[2];
  // Copies under way, oldest first, and how many each group has; the last group is open.
  std::vector<Copy> copies;
  std::vector<int> groups;
  // Of global memory: it wrote since its last fence; ends of its block's phases that its last fence made visible to
  // others; what it learnt of other blocks from atomic operations, and what a fence has made visible of that.
  bool unfenced;
  unsigned released;
  Ends learnt, known;
};

struct Warp {
  Block* block = nullptr;
  Fiber* lanes[WARP];
  unsigned count, priority;
  unsigned step;  // raised by what orders the memory accesses of a warp's lanes
};

// Who touched a word, when, and where in the code.
struct Access {
  unsigned block, phase, step;
  int thread = -1;  // nobody yet
  const void* at;
};

// The last write of a word, and the last read: by several lanes of that warp, by several warps, by several blocks.
enum class Spread : unsigned char { LANE, LANES, WARPS, BLOCKS };
struct Cell {
  Access write, read;
  Spread readers = Spread::LANE;
  bool atomic = false, constant = false, copying = false;
  unsigned life = 0;  // of which it tells
};

struct Block {
  unsigned index;
  int rank;
  std::vector<Block*>* cluster;
  unsigned priority;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;  // while another block runs
  std::vector<Cell> cells;            // of shared memory, in the block's life so and so
  unsigned life = 0;
  unsigned phase;                     // raised by barriers
  unsigned released;                  // of all its threads, up to the last barrier: see Fiber
  Ends learnt, known;
};

struct Machine {
  const char* name;
  Launch launch;
  Fiber* running = nullptr;
  Block* present = nullptr;  // whose shared memory is in its place
  const void* probing = nullptr;  // who is about to touch memory
  std::vector<Block*> resident;
};
extern Machine now;

// Ends the launch. {+0x…} in the text are places in this library.
[[noreturn]] void fail(const char* format, ...);
std::string place(const void* at);

unsigned random(unsigned below);
constexpr unsigned ANY = 0xffffffffu;
// Let others run.
void leave(State state);
// Sometimes.
void break_at_random();

// memory.cpp
void find_shared(unsigned char* dynamic);
void forget_memory();
void clean_shared(Block& block);
void bring_shared(Block& block);
void end_of_thread();
void merge_at_barrier(Block& block);
bool in_stack(const void* p);  // of the running thread

}  // namespace machine
