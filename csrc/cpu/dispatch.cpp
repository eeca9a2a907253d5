// Chooses the instruction set at run time, by its speed on this CPU rather than by its flag alone.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "kernels.h"

namespace grit {

#define GRIT_TABLE(isa)         \
  namespace isa {               \
  extern const Kernels table;   \
  }
#if defined(__x86_64__) && !defined(GRIT_PORTABLE_ONLY)
#if defined(GRIT_HAS_AMX)
GRIT_TABLE(amx)
GRIT_TABLE(amx_emulated)
#endif
GRIT_TABLE(avx512_bf16)
GRIT_TABLE(avx512)
GRIT_TABLE(avx2)
#endif
GRIT_TABLE(portable)

namespace {

struct Choice {
  const Kernels* bf16_products;
  const Kernels* others;

  const char* name() const { return bf16_products->name; }
};

// the sets that this CPU runs, best first; the emulation of tiles is for tests and comes last
std::vector<Choice> usable() {
  std::vector<Choice> list;
  auto add = [&](const Kernels& table) { list.push_back({&table, &table}); };
#if defined(__x86_64__) && !defined(GRIT_PORTABLE_ONLY)
  const CpuFeatures& cpu = cpu_features();
#if defined(GRIT_HAS_AMX)
  if (cpu.amx) list.push_back({&amx::table, &avx512_bf16::table});
#endif
  if (cpu.avx512_bf16 && !cpu.slow_bf16_pairs) add(avx512_bf16::table);
  if (cpu.avx512) add(avx512::table);
  if (cpu.avx512_bf16 && cpu.slow_bf16_pairs) add(avx512_bf16::table);
  if (cpu.avx2) add(avx2::table);
#endif
  add(portable::table);
#if defined(GRIT_HAS_AMX)
  if (cpu.avx512) list.push_back({&amx_emulated::table, cpu.avx512_bf16 ? &avx512_bf16::table : &avx512::table});
#endif
  return list;
}

const std::vector<Choice>& choices() {
  static const std::vector<Choice> list = usable();
  return list;
}

std::string names(const char* separator) {
  std::string all;
  for (const Choice& choice : choices()) all += (all.empty() ? "" : separator) + std::string(choice.name());
  return all;
}

const Choice* find(const char* wanted) {
  for (const Choice& choice : choices())
    if (!wanted || !std::strcmp(wanted, choice.name())) return &choice;
  throw std::runtime_error("GRIT_KERNELS_CPU_ISA: expected one of " + names(", ") + " on this CPU, got '" + wanted + "'");
}

std::atomic<const Choice*> chosen{nullptr};

const Choice& choice() {
  const Choice* found = chosen.load(std::memory_order_acquire);
  if (!found) {
    const char* wanted = std::getenv("GRIT_KERNELS_CPU_ISA");
    found = find(wanted && *wanted ? wanted : nullptr);
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

}  // namespace

const Kernels& kernels() { return *choice().others; }

const Kernels& product_kernels(DType dtype) {
  const Choice& found = choice();
  return dtype == DType::bfloat16 ? *found.bf16_products : *found.others;
}

}  // namespace grit

// Called by tests and `grit doctor` through ctypes; they touch no tensors, so they need no op.
#define GRIT_EXPORT extern "C" __attribute__((visibility("default")))

// Names of the usable sets, best first, separated by commas.
GRIT_EXPORT const char* grit_kernels_cpu_isas() {
  static const std::string all = grit::names(",");
  return all.c_str();
}

// Uses the named set from now on (nullptr: the best); returns 0, or 1 if this CPU does not have it.
GRIT_EXPORT int grit_kernels_set_cpu_isa(const char* name) {
  try {
    grit::chosen.store(grit::find(name), std::memory_order_release);
    return 0;
  } catch (const std::runtime_error&) {
    return 1;
  }
}

// The set in use, for products of bfloat16 or for everything else. Empty if GRIT_KERNELS_CPU_ISA names an unknown one.
GRIT_EXPORT const char* grit_kernels_cpu_isa_of(int bf16_products) {
  try {
    return bf16_products ? grit::product_kernels(grit::DType::bfloat16).name : grit::kernels().name;
  } catch (const std::runtime_error&) {
    return "";
  }
}

// Why the tile registers are not used; empty if they are.
GRIT_EXPORT const char* grit_kernels_amx_reason() { return grit::cpu_features().amx_reason; }
