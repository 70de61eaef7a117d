// A GPU on the host, as far as the kernels can tell: blocks of threads in warps, their barriers and exchanges, memory.
//
// A thread is a fiber. It runs alone until it meets others: at a barrier, in an exchange within its warp, or where the
// machine takes a break at random. Who goes on then is drawn from a seed: lanes of a warp in any order, warps of several
// blocks by priorities that change rarely, so that one may fall far behind another.
#pragma once

namespace machine {

constexpr int WARP = 32;
constexpr unsigned MAX_SHARED = 227 << 10;

struct Index {
  unsigned x, y, z;
};

// The same for a fiber's whole life, so that the compiler may ask once.
[[gnu::const]] Index thread_index();
[[gnu::const]] Index block_index();
[[gnu::const]] Index grid_size();
[[gnu::const]] int cluster_rank();

void block_barrier();
void cluster_barrier();

// Every lane brings a value: SYNC nothing · BALLOT a bit, and gets a bit per lane · OR, and gets all of them together ·
// LANE and XOR, and gets that of lane `other`, or of its own number xor `other`.
enum class Op { SYNC, BALLOT, OR, LANE, XOR, MMA };
unsigned exchange(Op op, unsigned mask, unsigned value, unsigned other);

// Elements of two bytes.
enum class Kind { BFLOAT16, FLOAT16 };
float value(Kind kind, unsigned bits);
unsigned pack(Kind kind, float low, float high);  // nearest even
// d[16 x 8] += a[16 x 16] · b[16 x 8] in float32, held by the lanes as PTX has it for mma.m16n8k16.
void mma(Kind kind, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

// Memory of the device. `read_only`: through a cache that does not see what the kernel writes.
void read(const void* p, unsigned bytes, void* to);
void read_only(const void* p, unsigned bytes, void* to);
void write(void* p, unsigned bytes, const void* from);
enum class Atomic { ADD, OR };
unsigned atomic(void* p, Atomic what, unsigned v);  // the value before
void fence();
void prefetch_line(const void* p);
void prefetch_range(const void* p, unsigned bytes);

// Copies of 16 bytes to shared memory, which arrive as late as they may: in `wait` for all but the last `pending`
// groups of this thread. Until then the target holds NaN.
void copy(void* to, const void* from, bool live);
void commit();
void wait(int pending);

// The same place of shared memory in another block of the cluster.
float load_of(const float* mine, int rank);

struct Launch {
  unsigned blocks, threads, shared;
  unsigned long long seed;
};

// One launch from begin to end; null, or what went wrong. `memory`: dynamic shared memory.
const char* run(const char* name, void (*body)(const void*), const void* arguments, const Launch& launch, int cluster,
                unsigned char* memory);

}  // namespace machine
