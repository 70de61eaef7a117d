// Memory: shared memory per block, copies that arrive late, and who may see what of whom.
//
// Every access of the kernel comes by here, through the calls that g++ puts in for a thread sanitizer. Two accesses of
// a word, one of them a write, need an order:
//   in a block       a barrier between them; within a warp __syncwarp will do
//   between blocks   a fence after the one, in that thread or behind a barrier, then an atomic operation that an atomic
//                    operation of the other side sees, then a fence on that side
// This is a part of PTX's memory model: what it accepts is in order, what is in order by other means it refuses.

#include "state.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <link.h>

namespace machine {

namespace {

using Bytes = unsigned char*;

// What `__shared__` declares, in its place: the thread-local memory of this library. Of dynamic shared memory only as
// much as the launch asked for is there.
struct Window {
  Bytes begin = nullptr, end = nullptr, dynamic = nullptr;
  Bytes hole() const { return dynamic + now.launch.shared; }
  Bytes hole_end() const { return dynamic + MAX_SHARED; }
  std::size_t size() const { return end - begin - (hole_end() - hole()); }
  bool has(const void* p) const { return p >= begin && p < end; }
  // Place of p among the bytes that are there.
  std::size_t offset(const void* p) const {
    const auto* byte = static_cast<const unsigned char*>(p);
    if (byte >= hole() && byte < hole_end()) fail("touches dynamic shared memory beyond its %u bytes", now.launch.shared);
    return byte - begin - (byte >= hole_end() ? hole_end() - hole() : 0);
  }
};
Window window;

constexpr unsigned PAGE = 1024;  // words
std::unordered_map<std::uintptr_t, std::unique_ptr<Cell[]>> pages;
std::uintptr_t last_page;
Cell* last_cells;
// What a thread that sees an atomic operation's result learns.
std::unordered_map<const void*, Ends> published;

Cell& global_cell(const void* p) {
  const auto word = reinterpret_cast<std::uintptr_t>(p) / 4, page = word / PAGE;
  if (last_cells == nullptr || page != last_page) {
    auto& cells = pages[page];
    if (!cells) cells.reset(new Cell[PAGE]);
    last_page = page;
    last_cells = cells.get();
  }
  return last_cells[word % PAGE];
}

void learn(Ends& ends, const Ends& more) {
  for (const auto& [block, phase] : more) ends[block] = std::max(ends[block], phase);
}

unsigned end_of(const Ends& ends, unsigned block) {
  const auto found = ends.find(block);
  return found == ends.end() ? 0 : found->second;
}

Warp& warp_of(const Fiber& fiber) { return fiber.block->warps[fiber.thread / WARP]; }

Access mine(const void* at) {
  const Fiber& f = *now.running;
  return {f.block->index, f.block->phase, warp_of(f).step, static_cast<int>(f.thread), at};
}

// Whether all that `spread` says comes before the running thread's `now_access`.
bool before(const Access& then, Spread spread, const Access& now_access) {
  if (then.thread < 0) return true;
  if (then.block != now_access.block || spread == Spread::BLOCKS) {
    const Fiber& f = *now.running;
    return spread != Spread::BLOCKS &&
           std::max(end_of(f.known, then.block), end_of(f.block->known, then.block)) > then.phase;
  }
  if (then.phase < now_access.phase) return true;
  if (spread == Spread::WARPS || then.thread / WARP != now_access.thread / WARP) return false;
  return then.step < now_access.step || (spread == Spread::LANE && then.thread == now_access.thread);
}

std::string of(const Access& then) {
  return "thread " + std::to_string(then.thread) + " of block " + std::to_string(then.block) + " at " + place(then.at);
}

void check_write(const Cell& cell, const Access& access) {
  if (cell.copying) fail("%s touches the target of a copy that has not arrived", place(access.at).c_str());
  if (cell.constant) fail("%s writes what this kernel reads as constant", place(access.at).c_str());
  if (!before(cell.write, Spread::LANE, access))
    fail("%s writes over what %s wrote, in no order", place(access.at).c_str(), of(cell.write).c_str());
  if (!before(cell.read, cell.readers, access))
    fail("%s writes over what %s reads, in no order", place(access.at).c_str(), of(cell.read).c_str());
}

void note_write(Cell& cell, const Access& access, bool atomic = false) {
  check_write(cell, access);
  cell.write = access;
  cell.atomic = atomic;
}

void note_read(Cell& cell, const Access& access) {
  if (cell.copying) fail("%s touches the target of a copy that has not arrived", place(access.at).c_str());
  if (!before(cell.write, Spread::LANE, access))
    fail("%s reads what %s writes, in no order", place(access.at).c_str(), of(cell.write).c_str());
  const Access& then = cell.read;
  Spread spread = Spread::LANE;
  if (then.thread >= 0 && then.block != access.block)
    spread = Spread::BLOCKS;
  else if (then.thread >= 0 && then.phase == access.phase) {
    if (cell.readers >= Spread::WARPS || then.thread / WARP != access.thread / WARP)
      spread = Spread::WARPS;
    else if (then.step == access.step && (cell.readers == Spread::LANES || then.thread != access.thread))
      spread = Spread::LANES;
  }
  cell.readers = cell.readers == Spread::BLOCKS ? Spread::BLOCKS : spread;
  cell.read = access;
}

Cell& shared_cell(Block& block, const void* p) {
  Cell& cell = block.cells[window.offset(p) / 4];
  if (cell.life != block.life) {
    cell = Cell{};
    cell.life = block.life;
  }
  return cell;
}

// Whether there is memory: if not, a signal says that `at` wanted it.
void probe(const void* p, unsigned bytes, const void* at) {
  const auto* byte = static_cast<const volatile unsigned char*>(p);
  now.probing = at;
  for (unsigned i = 0; i < bytes; i += 16) static_cast<void>(byte[i]);
  static_cast<void>(byte[bytes - 1]);
  now.probing = nullptr;
}

// Each word of [p, p + bytes), which the running thread reads or writes.
void touch(const void* p, unsigned bytes, bool write, const void* at) {
  const Access access = mine(at);
  probe(p, bytes, at);
  const auto* byte = static_cast<const unsigned char*>(p);
  const bool shared = window.has(p);
  for (unsigned i = 0; i < bytes; i += 4) {
    Cell& cell = shared ? shared_cell(*now.running->block, byte + i) : global_cell(byte + i);
    if (write)
      note_write(cell, access);
    else if (shared && cell.write.thread < 0 && !cell.copying)
      fail("%s reads shared memory that nobody wrote", place(at).c_str());
    else
      note_read(cell, access);
  }
  if (write && !shared) now.running->unfenced = true;
}

void check_alignment(const void* p, unsigned alignment, const void* at) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignment != 0)
    fail("%s touches %p, which is not aligned to %u bytes", place(at).c_str(), p, alignment);
}

void on_access(const void* p, unsigned bytes, unsigned alignment, bool write, const void* at) {
  if (now.running == nullptr || in_stack(p)) return;
  break_at_random();
  check_alignment(p, alignment, at);
  touch(p, bytes, write, at);
}

}  // namespace

void find_shared(unsigned char* dynamic) {
  struct Found {
    Bytes dynamic;
  } found{dynamic};
  window.dynamic = dynamic;
  const auto look = [](dl_phdr_info* info, std::size_t, void* data) {
    const auto* begin = static_cast<Bytes>(info->dlpi_tls_data);
    const Bytes wanted = static_cast<Found*>(data)->dynamic;
    for (int i = 0; begin != nullptr && i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type != PT_TLS || wanted < begin || wanted >= begin + header.p_memsz) continue;
      window.begin = const_cast<Bytes>(begin);
      window.end = window.begin + header.p_memsz;
      return 1;
    }
    return 0;
  };
  if (!dl_iterate_phdr(look, &found)) fail("no shared memory found");
}

void forget_memory() {
  pages.clear();
  last_cells = nullptr;
  published.clear();
}

void clean_shared(Block& block) {
  if (now.present == &block) now.present = nullptr;
  block.shared.assign(window.size(), 0xff);
  if (block.cells.size() <= window.size() / 4) block.cells.resize(window.size() / 4 + 1);
  ++block.life;
}

void bring_shared(Block& block) {
  if (now.present == &block) return;
  const std::size_t head = window.hole() - window.begin, tail = window.end - window.hole_end();
  if (now.present != nullptr) {
    std::memcpy(now.present->shared.data(), window.begin, head);
    std::memcpy(now.present->shared.data() + head, window.hole_end(), tail);
  }
  std::memcpy(window.begin, block.shared.data(), head);
  std::memcpy(window.hole_end(), block.shared.data() + head, tail);
  now.present = &block;
}

void end_of_thread() {
  if (!now.running->copies.empty()) fail("ends while a copy to shared memory is under way");
}

void merge_at_barrier(Block& block) {
  bool all_fenced = true;
  for (auto& warp : block.warps)
    for (unsigned i = 0; i < warp.count; ++i) {
      Fiber& f = *warp.lanes[i];
      all_fenced &= !f.unfenced;
      block.released = std::max(block.released, f.released);
      learn(block.learnt, f.learnt);
      learn(block.known, f.known);
      f.learnt.clear();
      f.known.clear();
    }
  if (all_fenced) block.released = block.phase + 1;
}

void read(const void* p, unsigned bytes, void* to) {
  const void* at = __builtin_return_address(0);
  on_access(p, bytes, bytes, false, at);
  std::memcpy(to, p, bytes);
}

void read_only(const void* p, unsigned bytes, void* to) {
  const void* at = __builtin_return_address(0);
  on_access(p, bytes, bytes, false, at);
  for (unsigned i = 0; i < bytes; i += 4) {
    Cell& cell = global_cell(static_cast<const unsigned char*>(p) + i);
    if (cell.write.thread >= 0)
      fail("%s reads as constant what %s wrote", place(at).c_str(), of(cell.write).c_str());
    cell.constant = true;
  }
  std::memcpy(to, p, bytes);
}

void write(void* p, unsigned bytes, const void* from) {
  on_access(p, bytes, bytes, true, __builtin_return_address(0));
  std::memcpy(p, from, bytes);
}

unsigned atomic(void* p, Atomic what, unsigned v) {
  const void* at = __builtin_return_address(0);
  break_at_random();
  check_alignment(p, sizeof v, at);
  Fiber& f = *now.running;
  const bool shared = window.has(p);
  Cell& cell = shared ? shared_cell(*f.block, p) : global_cell(p);
  const Access access = mine(at);
  if (cell.atomic)
    cell.write = access;
  else
    note_write(cell, access, true);
  if (!shared) {
    Ends& ends = published[p];
    learn(f.learnt, ends);
    learn(ends, {{f.block->index, std::max(f.released, f.block->released)}});
  }
  unsigned before;
  std::memcpy(&before, p, sizeof before);
  const unsigned after = what == Atomic::ADD ? before + v : before | v;
  std::memcpy(p, &after, sizeof after);
  return before;
}

void fence() {
  Fiber& f = *now.running;
  break_at_random();
  f.unfenced = false;
  // Barriers are cumulative: what others of the block wrote before the last one, too.
  f.released = f.block->phase;
  learn(f.known, f.block->learnt);
  learn(f.known, f.learnt);
}

void prefetch_line(const void* p) { probe(p, 1, __builtin_return_address(0)); }

void prefetch_range(const void* p, unsigned bytes) {
  const void* at = __builtin_return_address(0);
  check_alignment(p, 16, at);
  if (bytes % 16 != 0) fail("%s prefetches %u bytes", place(at).c_str(), bytes);
  probe(p, bytes, at);
}

void copy(void* to, const void* from, bool live) {
  const void* at = __builtin_return_address(0);
  break_at_random();
  Fiber& f = *now.running;
  Copy under_way = {static_cast<Bytes>(to), {}};
  check_alignment(to, sizeof under_way.bytes, at);
  check_alignment(from, sizeof under_way.bytes, at);
  if (!window.has(to)) fail("%s copies to what is not shared memory", place(at).c_str());
  if (live) {
    touch(from, sizeof under_way.bytes, false, at);
    std::memcpy(under_way.bytes, from, sizeof under_way.bytes);
  }
  for (unsigned i = 0; i < sizeof under_way.bytes; i += 4) {
    Cell& cell = shared_cell(*f.block, under_way.to + i);
    note_write(cell, mine(at));
    cell.copying = true;
  }
  std::memset(to, 0xff, sizeof under_way.bytes);
  f.copies.push_back(under_way);
  ++f.groups.back();
}

void commit() { now.running->groups.push_back(0); }

void wait(int pending) {
  const void* at = __builtin_return_address(0);
  Fiber& f = *now.running;
  break_at_random();
  const int arriving = std::max(static_cast<int>(f.groups.size()) - 1 - pending, 0);
  int count = 0;
  for (int i = 0; i < arriving; ++i) count += f.groups[i];
  for (int i = 0; i < count; ++i) {
    const Copy& c = f.copies[i];
    std::memcpy(c.to, c.bytes, sizeof c.bytes);
    for (unsigned b = 0; b < sizeof c.bytes; b += 4) {
      Cell& cell = shared_cell(*f.block, c.to + b);
      cell.copying = false;
      cell.write = mine(at);
    }
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + count);
  f.groups.erase(f.groups.begin(), f.groups.begin() + arriving);
}

float load_of(const float* mine, int rank) {
  const void* at = __builtin_return_address(0);
  break_at_random();
  const Block& own = *now.running->block;
  if (rank < 0 || rank >= static_cast<int>(own.cluster->size())) fail("%s: no block %d", place(at).c_str(), rank);
  Block& other = *(*own.cluster)[rank];
  if (std::all_of(other.fibers.begin(), other.fibers.end(), [](const auto& f) { return f->state == State::DONE; }))
    fail("%s reads shared memory of a block that has ended", place(at).c_str());
  Cell& cell = shared_cell(other, mine);
  if (cell.copying || cell.write.thread < 0 || cell.write.phase == other.phase)
    fail("%s reads what block %u has not written before the last barrier", place(at).c_str(), other.index);
  // Whoever writes there next must have passed another barrier with this block.
  cell.read = {other.index, other.phase, 0, 0, at};
  cell.readers = Spread::WARPS;
  float v;
  const void* there = &other == now.present ? static_cast<const void*>(mine) : &other.shared[window.offset(mine)];
  std::memcpy(&v, there, sizeof v);
  return v;
}

}  // namespace machine

// The calls that g++ -fsanitize=thread puts in before every access. 16 bytes may be two neighbours of 8.
extern "C" {
#define CALL(what, bytes, write)                                                                \
  void __tsan_##what##bytes(void* p) {                                                          \
    machine::on_access(p, bytes, bytes < 8 ? bytes : 8, write, __builtin_return_address(0));    \
  }                                                                                             \
  void __tsan_unaligned_##what##bytes(void* p) {                                                \
    machine::on_access(p, bytes, 1, write, __builtin_return_address(0));                        \
  }
#define CALLS(bytes) CALL(read, bytes, false) CALL(write, bytes, true)
CALLS(1)
CALLS(2)
CALLS(4)
CALLS(8)
CALLS(16)
void __tsan_read_range(void* p, unsigned long bytes) {
  if (bytes != 0) machine::on_access(p, bytes, 1, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long bytes) {
  if (bytes != 0) machine::on_access(p, bytes, 1, true, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
