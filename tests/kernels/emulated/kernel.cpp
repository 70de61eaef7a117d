// One of the kernels' sources as a library: -DSOURCE="…", -DOP=its function's name before the type.
#include "cuda.hpp"

// What a source without clusters does not say.
namespace unsaid {
constexpr int CLUSTER = 1;
}
namespace loramux {
using namespace unsaid;
}

#include SOURCE

namespace loramux {
alignas(16) thread_local unsigned char memory[machine::MAX_SHARED];
}

template <typename Args>
const char* run(void (*kernel)(Args), const char* name, const void* arguments, const machine::Launch& launch) {
  static void (*body)(Args);
  body = kernel;
  return machine::run(
      name, [](const void* a) { body(*static_cast<const Args*>(a)); }, arguments, launch, loramux::CLUSTER,
      loramux::memory);
}

#define JOIN(a, b) a##_##b
// Null, or what went wrong.
#define ENTRY(kernel)                                                                                  \
  extern "C" const char* JOIN(run, kernel)(const void* arguments, const machine::Launch* launch) {   \
    return run(kernel, #kernel, arguments, *launch);                                                   \
  }
#define KERNELS(op) ENTRY(op##_bfloat16) ENTRY(op##_float16)
#define EACH(op) KERNELS(op)
EACH(OP)
