// Chooses the instruction set at run time.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace grit {

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
#endif
namespace portable {
extern const Kernels table;
}

namespace {

struct Candidate {
  const Kernels* table;
  bool usable;
};

// best first
const Candidate* candidates(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  static const Candidate list[] = {
      {&avx512_bf16::table, has_bf16}, {&avx512::table, has_avx512}, {&avx2::table, has_avx2}, {&portable::table, true}};
  *count = 4;
#else
  static const Candidate list[] = {{&portable::table, true}};
  *count = 1;
#endif
  return list;
}

const Kernels* find(const char* wanted) {
  int count;
  const Candidate* list = candidates(&count);
  std::string usable;
  for (int i = 0; i < count; ++i) {
    if (!list[i].usable) continue;
    if (!wanted || !std::strcmp(wanted, list[i].table->name)) return list[i].table;
    usable += (usable.empty() ? "" : ", ") + std::string(list[i].table->name);
  }
  throw std::runtime_error("GRIT_KERNELS_CPU_ISA: expected one of " + usable + " on this CPU, got '" + std::string(wanted) + "'");
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (!table) {
    const char* wanted = std::getenv("GRIT_KERNELS_CPU_ISA");
    table = find(wanted && *wanted ? wanted : nullptr);
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

}  // namespace grit

// For tests and `grit doctor` through ctypes; they hold no state of torch, so they need no op.

// Names of the usable sets, best first, separated by commas.
extern "C" __attribute__((visibility("default"))) const char* grit_kernels_cpu_isas() {
  static const std::string names = [] {
    int count;
    const grit::Candidate* list = grit::candidates(&count);
    std::string all;
    for (int i = 0; i < count; ++i)
      if (list[i].usable) all += (all.empty() ? "" : ",") + std::string(list[i].table->name);
    return all;
  }();
  return names.c_str();
}

// Uses the named set from now on (nullptr: the best); 0 on success, 1 when this CPU does not have it.
extern "C" __attribute__((visibility("default"))) int grit_kernels_set_cpu_isa(const char* name) {
  try {
    grit::chosen.store(grit::find(name), std::memory_order_release);
    return 0;
  } catch (const std::runtime_error&) {
    return 1;
  }
}
