#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cerrno>
#include <cstring>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace grit {
namespace {

#if defined(__x86_64__)

bool is_intel() {
  unsigned highest, name[3];
  if (!__get_cpuid(0, &highest, &name[0], &name[2], &name[1])) return false;
  return !std::memcmp(name, "GenuineIntel", 12);
}

bool has_amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
}

// Linux grants a process the 8 KB of tile registers on request; a container or an old kernel may refuse.
const char* ask_for_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned long GET = 0x1022, REQUEST = 0x1023, TILE_DATA = 18;
  unsigned long granted = 0;
  if (!syscall(SYS_arch_prctl, REQUEST, TILE_DATA) && !syscall(SYS_arch_prctl, GET, &granted) && granted >> TILE_DATA & 1)
    return "";
  if (errno == ENOSPC) return "the CPU has AMX, but an alternate signal stack of this process has no room for its tiles";
  return "the CPU has AMX, but the kernel does not let this process use it "
         "(it takes Linux 5.16 or newer, and a sandbox that allows arch_prctl)";
#else
  return "the CPU has AMX, which is used under Linux only";
#endif
}

CpuFeatures look() {
  __builtin_cpu_init();
  CpuFeatures f = {};
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  f.avx512_bf16 = f.avx512 && __builtin_cpu_supports("avx512bf16");
  f.slow_bf16_pairs = is_intel();
#if !defined(GRIT_HAS_AMX)
  f.amx_reason = "the compiler that built the library does not know AMX";
#else
  f.amx_reason = f.avx512_bf16 && has_amx_bf16() ? ask_for_tiles() : "the CPU has no AMX";
  f.amx = !*f.amx_reason;
#endif
  return f;
}

#else

CpuFeatures look() { return {false, false, false, false, false, "the CPU has no AMX"}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = look();
  return features;
}

}  // namespace grit
