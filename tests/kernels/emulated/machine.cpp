// Threads, warps, blocks: who runs when, and how they meet.

#include "state.hpp"

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <sys/mman.h>

namespace machine {

Machine now;

namespace {

constexpr unsigned STACK = 64 << 10, RESIDENT = 4, BREAK = 4000, ALL_LANES = 0xffffffffu;

std::jmp_buf scheduler;
sigjmp_buf host;
std::string failure;
void (*body)(const void*);
const void* arguments;
unsigned long long random_state;
unsigned until_break;

// Blocks and the stacks of their threads, kept from launch to launch.
struct Seats {
  std::vector<std::unique_ptr<Block>> blocks;
  std::unordered_map<Fiber*, unsigned char*> stacks;
};
Seats seats;

void life() {
  for (;;) {
    body(arguments);
    end_of_thread();
    leave(State::DONE);
  }
}

[[gnu::noinline]] void resume(Fiber& fiber) {
  now.running = &fiber;
  bring_shared(*fiber.block);
  if (_setjmp(scheduler)) {
    now.running = nullptr;
    return;
  }
  if (fiber.born) _longjmp(fiber.at, 1);
  fiber.born = true;
  setcontext(&fiber.birth);
}

Fiber* make_fiber() {
  auto* fiber = new Fiber;
  void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  seats.stacks[fiber] = static_cast<unsigned char*>(stack);
  return fiber;
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.birth);
  fiber.birth.uc_stack.ss_sp = seats.stacks[&fiber];
  fiber.birth.uc_stack.ss_size = STACK;
  fiber.birth.uc_link = nullptr;
  makecontext(&fiber.birth, life, 0);
  fiber.born = false;
}

// Warps of a block mostly run together, because another block's shared memory has to be brought.
void draw_priority(Warp& warp) {
  const unsigned other = random(ANY);
  warp.priority = random(4) == 0 ? other : (warp.block->priority & ~0xffffu) | (other & 0xffffu);
}

// A block takes its seat.
void seat(Block& block, unsigned index, int rank, std::vector<Block*>* cluster) {
  const unsigned threads = now.launch.threads;
  block.index = index;
  block.rank = rank;
  block.cluster = cluster;
  while (block.fibers.size() < threads) block.fibers.emplace_back(make_fiber());
  block.warps.assign((threads + WARP - 1) / WARP, Warp{});
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    if (fiber.state != State::DONE || fiber.block == nullptr) prepare(fiber);
    fiber.block = &block;
    fiber.thread = i;
    fiber.state = State::READY;
    fiber.copies.clear();
    fiber.groups.assign(1, 0);
    fiber.unfenced = false;
    fiber.released = 0;
    fiber.learnt.clear();
    fiber.known.clear();
    Warp& warp = block.warps[i / WARP];
    warp.block = &block;
    warp.lanes[warp.count++] = &fiber;
  }
  block.priority = random(ANY);
  for (Warp& warp : block.warps) draw_priority(warp);
  block.phase = block.released = 0;
  block.learnt.clear();
  block.known.clear();
  clean_shared(block);
}

template <typename Each>
bool all(const Block& block, Each&& each) {
  return std::all_of(block.warps.begin(), block.warps.end(), [&](const Warp& w) {
    return std::all_of(w.lanes, w.lanes + w.count, [&](const Fiber* f) { return each(*f); });
  });
}

bool all_in(const Block& block, State state) {
  return all(block, [&](const Fiber& f) { return f.state == state; });
}

void raise_phase(Block& block) {
  merge_at_barrier(block);
  ++block.phase;
  for (Warp& warp : block.warps) {
    ++warp.step;
    for (unsigned i = 0; i < warp.count; ++i) warp.lanes[i]->state = State::READY;
  }
}

void multiply(Warp& warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const Fiber& f = *warp.lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half)
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = machine::value(f.kind, f.a[i] >> 16 * half & 0xffff);
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half)
        b[2 * t + 8 * i + half][g] = machine::value(f.kind, f.b[i] >> 16 * half & 0xffff);
  }
  for (int lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      warp.lanes[lane]->d[i] += sum;
    }
}

// All lanes have come: each gets its result in `value`.
void complete(Warp& warp) {
  const Op op = warp.lanes[0]->op;
  unsigned values[WARP], together = 0, ballot = 0;
  for (int i = 0; i < WARP; ++i) {
    const Fiber& f = *warp.lanes[i];
    if (f.op != op) fail("lanes of one warp are in different exchanges");
    values[i] = f.value;
    together |= f.value;
    ballot |= (f.value != 0 ? 1u : 0u) << i;
  }
  if (op == Op::MMA) multiply(warp);
  if (op == Op::SYNC) ++warp.step;
  for (int i = 0; i < WARP; ++i) {
    Fiber& f = *warp.lanes[i];
    if (op == Op::BALLOT) f.value = ballot;
    if (op == Op::OR) f.value = together;
    if (op == Op::LANE) f.value = values[f.other % WARP];
    if (op == Op::XOR) f.value = values[(i ^ f.other) % WARP];
    f.state = State::READY;
  }
}

// Lanes in any order, each until it has to wait or takes a break.
void advance(Warp& warp) {
  const unsigned first = random(WARP), stride = 2 * random(WARP / 2) + 1;
  unsigned exchanging = 0;
  for (unsigned i = 0; i < WARP; ++i) {
    const unsigned lane = (first + i * stride) % WARP;
    if (lane >= warp.count) continue;
    Fiber& fiber = *warp.lanes[lane];
    if (fiber.state == State::READY) resume(fiber);
    exchanging += fiber.state == State::IN_EXCHANGE;
  }
  if (exchanging == WARP) complete(warp);
}

std::string waiting() {
  std::string text;
  for (const Block* block : now.resident) {
    unsigned counts[5] = {};
    all(*block, [&](const Fiber& f) { return ++counts[static_cast<int>(f.state)] > 0; });
    char line[200];
    std::snprintf(line, sizeof line, "; block %u: %u in an exchange, %u at a barrier, %u at a cluster's, %u at their end",
                  block->index, counts[1], counts[2], counts[3], counts[4]);
    text += line;
  }
  return text;
}

// Barriers that all have reached open. Whether one did.
bool open_barriers() {
  bool opened = false;
  for (Block* block : now.resident) {
    if (all_in(*block, State::AT_BARRIER)) raise_phase(*block), opened = true;
    const auto waits = [](const Block* b) { return all_in(*b, State::AT_CLUSTER_BARRIER); };
    if (std::all_of(block->cluster->begin(), block->cluster->end(), waits)) {
      for (Block* b : *block->cluster) raise_phase(*b);
      opened = true;
    }
  }
  return opened;
}

bool can_run(const Warp& warp) {
  return std::any_of(warp.lanes, warp.lanes + warp.count, [](const Fiber* f) { return f->state == State::READY; });
}

// Until every resident block of some cluster is done.
void run_until_done() {
  for (;;) {
    Warp* best = nullptr;
    for (Block* block : now.resident)
      for (Warp& warp : block->warps)
        if ((best == nullptr || warp.priority > best->priority) && can_run(warp)) best = &warp;
    if (best == nullptr) {
      if (open_barriers()) continue;
      fail("threads wait for each other%s", waiting().c_str());
    }
    advance(*best);
    if (random(8) == 0) draw_priority(*best);
    if (all_in(*best->block, State::DONE)) {
      const auto done = [](const Block* b) { return all_in(*b, State::DONE); };
      if (std::all_of(best->block->cluster->begin(), best->block->cluster->end(), done)) return;
    }
  }
}

void schedule(int cluster) {
  const unsigned clusters = now.launch.blocks / cluster;
  if (clusters * cluster != now.launch.blocks) fail("%u blocks are no whole clusters", now.launch.blocks);
  const unsigned together = cluster > 1 ? 1 : 1 + random(RESIDENT);
  std::vector<unsigned> order(clusters);
  for (unsigned i = 0; i < clusters; ++i) order[i] = i;
  for (unsigned i = clusters; i > 1; --i) std::swap(order[i - 1], order[random(i)]);
  std::vector<std::vector<Block*>> rooms(together);
  while (seats.blocks.size() < together * cluster) seats.blocks.emplace_back(new Block);
  for (unsigned i = 0; i < together; ++i)
    for (int rank = 0; rank < cluster; ++rank) rooms[i].push_back(seats.blocks[i * cluster + rank].get());
  std::vector<std::vector<Block*>*> empty;
  for (auto& room : rooms) empty.push_back(&room);
  for (;;) {
    for (; !empty.empty() && !order.empty(); empty.pop_back(), order.pop_back())
      for (int rank = 0; rank < cluster; ++rank) {
        Block* block = (*empty.back())[rank];
        seat(*block, order.back() * cluster + rank, rank, empty.back());
        now.resident.push_back(block);
      }
    if (now.resident.empty()) return;
    run_until_done();
    for (auto& room : rooms) {
      const auto here = std::find(now.resident.begin(), now.resident.end(), room[0]);
      if (here == now.resident.end()) continue;
      if (!std::all_of(room.begin(), room.end(), [](const Block* b) { return all_in(*b, State::DONE); })) continue;
      now.resident.erase(here, here + cluster);
      empty.push_back(&room);
    }
  }
}

void on_signal(int signal, siginfo_t* info, void* context) {
  const auto* c = static_cast<const ucontext_t*>(context);
#if defined(__x86_64__)
  const void* at = reinterpret_cast<const void*>(c->uc_mcontext.gregs[REG_RIP]);
#else
  const void* at = reinterpret_cast<const void*>(c->uc_mcontext.pc);
#endif
  if (signal == SIGILL || signal == SIGTRAP) fail("%s is undefined behaviour", place(at).c_str());
  const void* who = now.probing != nullptr ? now.probing : at;
  fail("%s touches %p, which is not its memory", place(who).c_str(), info->si_addr);
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP}, COUNT = sizeof SIGNALS / sizeof *SIGNALS;

}  // namespace

std::string place(const void* at) {
  Dl_info info;
  if (!dladdr(at, &info)) return "?";
  char text[40];
  // Of the call, not of where it returns to.
  std::snprintf(text, sizeof text, "{+0x%lx}",
                static_cast<unsigned long>(static_cast<const char*>(at) - static_cast<const char*>(info.dli_fbase) - 1));
  return text;
}

void fail(const char* format, ...) {
  char text[1000];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  failure = now.name;
  if (now.running != nullptr)
    failure += ", block " + std::to_string(now.running->block->index) + ", thread " +
               std::to_string(now.running->thread);
  failure += ": ";
  failure += text;
  siglongjmp(host, 1);
}

unsigned random(unsigned below) {
  // splitmix64
  unsigned long long z = random_state += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return static_cast<unsigned>(((z ^ z >> 31) >> 32) * below >> 32);
}

[[gnu::noinline]] void leave(State state) {
  Fiber& fiber = *now.running;
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) _longjmp(scheduler, 1);
}

void break_at_random() {
  if (until_break-- != 0) return;
  until_break = random(BREAK);
  leave(State::READY);
}

bool in_stack(const void* p) {
  const auto* stack = static_cast<const unsigned char*>(now.running->birth.uc_stack.ss_sp);
  return static_cast<const unsigned char*>(p) >= stack && static_cast<const unsigned char*>(p) < stack + STACK;
}

Index thread_index() { return {now.running->thread, 0, 0}; }
Index block_index() { return {now.running->block->index, 0, 0}; }
Index grid_size() { return {now.launch.blocks, 1, 1}; }
int cluster_rank() { return now.running->block->rank; }

void block_barrier() { leave(State::AT_BARRIER); }
void cluster_barrier() { leave(State::AT_CLUSTER_BARRIER); }

unsigned exchange(Op op, unsigned mask, unsigned value, unsigned other) {
  Fiber& fiber = *now.running;
  if (mask != ALL_LANES) fail("this machine knows no exchange of a part of a warp");
  fiber.op = op;
  fiber.value = value;
  fiber.other = other;
  leave(State::IN_EXCHANGE);
  return fiber.value;
}

void mma(Kind kind, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Fiber& fiber = *now.running;
  fiber.kind = kind;
  fiber.d = d;
  std::memcpy(fiber.a, a, sizeof a);
  std::memcpy(fiber.b, b, sizeof b);
  exchange(Op::MMA, ALL_LANES, 0, 0);
}

float value(Kind kind, unsigned bits) {
  if (kind == Kind::BFLOAT16) {
    const unsigned word = bits << 16;
    float v;
    std::memcpy(&v, &word, sizeof v);
    return v;
  }
  const auto half = static_cast<unsigned short>(bits);
  _Float16 v;
  std::memcpy(&v, &half, sizeof v);
  return static_cast<float>(v);
}

unsigned pack(Kind kind, float low, float high) {
  unsigned packed = 0;
  for (const float v : {high, low}) {
    unsigned bits;
    std::memcpy(&bits, &v, sizeof v);
    if (kind == Kind::FLOAT16) {
      const auto half = static_cast<_Float16>(v);
      unsigned short h;
      std::memcpy(&h, &half, sizeof h);
      bits = h;
    } else {
      bits = v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    packed = packed << 16 | bits;
  }
  return packed;
}

const char* run(const char* name, void (*kernel)(const void*), const void* args, const Launch& launch, int cluster,
                unsigned char* memory) {
  now.name = name;
  now.launch = launch;
  now.running = nullptr;
  now.present = nullptr;
  now.probing = nullptr;
  now.resident.clear();
  body = kernel;
  arguments = args;
  random_state = launch.seed;
  until_break = random(BREAK);
  find_shared(memory);
  forget_memory();
  struct sigaction ours = {}, before[COUNT];
  ours.sa_sigaction = on_signal;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (int i = 0; i < COUNT; ++i) sigaction(SIGNALS[i], &ours, &before[i]);
  const bool failed = sigsetjmp(host, 1) != 0;
  if (!failed) schedule(cluster);
  // What runs between launches is this library's own: its accesses are nobody's.
  now.running = nullptr;
  for (int i = 0; i < COUNT; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
  return failed ? failure.c_str() : nullptr;
}

}  // namespace machine
