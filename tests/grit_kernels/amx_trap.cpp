// Computes what a CPU without AMX traps at, so that the compiled AMX kernels can be tested there as they are shipped.
//
// Preloaded into a process (tests/grit_kernels/amx_trap.py). The CPU raises SIGILL at an instruction it does not have; the handler
// computes it on the registers that the kernel saved and continues behind it. It knows the instructions of AMX-TILE and AMX-BF16,
// and the three of AVX512-BF16 between whole registers, by Intel's manual (Software Developer's Manual, volume 2, and the
// Instruction Set Extensions reference): FP32 sums, rounding to nearest even, denormals counting as 0. Anything else, and whatever
// a CPU would refuse (an unconfigured tile, a configuration with reserved bits, a tile with more rows than configured), ends the
// process with a message.
//
// The library asks CPUID for AMX when it is loaded. Between grit_trap_show_amx(1) and (0), CPUID faults in the calling thread (a
// feature of the CPU that Linux passes on), and the handler adds AMX to what it says; the kernel's permission is granted by the
// syscall() below, which takes the place of libc's.
#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr long SET_CPUID = 0x1012, REQUEST_PERMISSION = 0x1023, GET_PERMISSION = 0x1022, TILE_DATA = 18;
enum Kind { CONFIGURE, RELEASE, ZERO, LOAD, STORE, PRODUCT, CONVERT, PAIRS, KINDS };

std::atomic<int64_t> counts[KINDS];
std::atomic<int64_t> configured_threads;

struct Tile {
  int rows = 0, bytes = 0;
  alignas(64) uint8_t data[16][64] = {};
};
thread_local Tile tiles[8];
thread_local bool configured = false;

long raw_syscall(long number, long a, long b, long c, long d, long e, long f) {
  long result;
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return result;
}

[[noreturn]] void refuse(const char* why, const uint8_t* at) {
  std::fprintf(stderr, "amx_trap: %s at", why);
  for (int i = 0; i < 12; ++i) std::fprintf(stderr, " %02x", at[i]);
  std::fprintf(stderr, "\n");
  _exit(70);
}

// ---- general registers, by their numbers in instructions

greg_t& general(ucontext_t* context, int number) {
  static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[places[number]];
}

// The memory operand of ModRM (base and displacement, and the index in `stride` where there is one); moves `at` behind it.
uint8_t* operand(ucontext_t* context, const uint8_t*& at, bool x, bool b, int64_t* stride) {
  const uint8_t* start = at;
  const int mod = *at >> 6, rm = *at & 7;
  ++at;
  int64_t address = 0;
  *stride = 0;
  if (rm == 4) {
    const int scale = *at >> 6, index = (*at >> 3 & 7) | (x << 3), base = (*at & 7) | (b << 3);
    ++at;
    if (index != 4) *stride = general(context, index) << scale;
    if ((base & 7) == 5 && mod == 0) refuse("an address without base", start);
    address = general(context, base);
  } else {
    if (rm == 5 && mod == 0) refuse("an address relative to the instruction", start);
    address = general(context, rm | (b << 3));
  }
  if (mod == 1) address += (int8_t)*at++;
  else if (mod == 2) {
    int32_t far;
    std::memcpy(&far, at, 4);
    at += 4;
    address += far;
  }
  return reinterpret_cast<uint8_t*>(address);
}

// ---- AMX

struct Configuration {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

void release() {
  if (configured) configured_threads.fetch_sub(1);
  configured = false;
  for (Tile& tile : tiles) tile = Tile();
}

void configure(const uint8_t* from, const uint8_t* at) {
  Configuration c;
  static_assert(sizeof(c) == 64);
  std::memcpy(&c, from, sizeof(c));
  release();
  if (c.palette == 0) return;
  bool valid = c.palette == 1;
  for (uint8_t byte : c.reserved) valid &= byte == 0;
  for (int i = 0; i < 16; ++i) valid &= i < 8 ? c.bytes[i] <= 64 && c.rows[i] <= 16 && (c.bytes[i] == 0) == (c.rows[i] == 0) : c.bytes[i] == 0 && c.rows[i] == 0;
  if (!valid || c.start) refuse("an invalid configuration of tiles", at);
  configured = true;
  configured_threads.fetch_add(1);
  for (int i = 0; i < 8; ++i) tiles[i].rows = c.rows[i], tiles[i].bytes = c.bytes[i];
}

Tile& tile(int number, const uint8_t* at) {
  if (number > 7 || !configured || !tiles[number].rows) refuse("a tile that is not configured", at);
  return tiles[number];
}

float of_bfloat16(uint16_t bits) {
  const uint32_t word = (uint32_t)bits << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// with denormals counting as 0 on input and output, and rounding to nearest even: these instructions do not look at MXCSR
struct FlushDenormals {
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(0x9fc0); }
  ~FlushDenormals() { _mm_setcsr(before); }
};

__attribute__((noinline)) void multiply(Tile& sums, const Tile& a, const Tile& b, const uint8_t* at) {
  if (sums.rows != a.rows || sums.bytes != b.bytes || a.bytes != 4 * b.rows || a.bytes % 4 || b.bytes % 4) refuse("tiles whose sizes do not match", at);
  FlushDenormals block;
  for (int m = 0; m < sums.rows; ++m) {
    alignas(64) volatile float even[16] = {}, odd[16] = {};
    uint16_t left[32], right[32];
    std::memcpy(left, a.data[m], 64);
    for (int k = 0; k < a.bytes / 4; ++k) {
      std::memcpy(right, b.data[k], 64);
      for (int n = 0; n < b.bytes / 4; ++n) {
        even[n] = __builtin_fmaf(of_bfloat16(left[2 * k]), of_bfloat16(right[2 * n]), even[n]);
        odd[n] = __builtin_fmaf(of_bfloat16(left[2 * k + 1]), of_bfloat16(right[2 * n + 1]), odd[n]);
      }
    }
    float total[16];
    std::memcpy(total, sums.data[m], 64);
    for (int n = 0; n < sums.bytes / 4; ++n) {
      volatile float pair = even[n] + odd[n];
      total[n] += pair;
    }
    std::memcpy(sums.data[m], total, 64);
  }
}

bool amx(ucontext_t* context, const uint8_t*& at) {
  const uint8_t* start = at;
  if (at[0] != 0xc4 || (at[1] & 31) != 2 || at[2] & 0x84) return false;  // VEX, map 0F38, 128 bits, W0
  const bool r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20);
  const int other = ~at[2] >> 3 & 15, prefix = at[2] & 3, code = at[3];  // prefix: 0 none, 1 66, 2 F3, 3 F2
  at += 4;
  const int mod = *at >> 6, reg = (*at >> 3 & 7) | (r << 3), rm = (*at & 7) | (b << 3);
  int64_t stride;
  if (code == 0x49 && prefix == 0 && mod == 3 && reg == 0 && rm == 0) {
    ++at;
    release();
    ++counts[RELEASE];
  } else if (code == 0x49 && prefix == 0 && mod != 3 && reg == 0) {
    const uint8_t* from = operand(context, at, x, b, &stride);
    configure(from + stride, start);
    ++counts[CONFIGURE];
  } else if (code == 0x49 && prefix == 3 && mod == 3 && rm == 0) {
    ++at;
    Tile& into = tile(reg, start);
    std::memset(into.data, 0, sizeof(into.data));
    ++counts[ZERO];
  } else if (code == 0x4b && prefix && mod != 3 && (*at & 7) == 4) {
    Tile& t = tile(reg, start);
    uint8_t* base = operand(context, at, x, b, &stride);
    const bool stores = prefix == 2;
    if (!stores) std::memset(t.data, 0, sizeof(t.data));
    for (int i = 0; i < t.rows; ++i)
      if (stores) std::memcpy(base + i * stride, t.data[i], t.bytes);
      else std::memcpy(t.data[i], base + i * stride, t.bytes);
    ++counts[stores ? STORE : LOAD];
  } else if (code == 0x5c && prefix == 2 && mod == 3) {
    ++at;
    if (reg == rm || reg == other || rm == other) refuse("one tile twice in a product", start);
    multiply(tile(reg, start), tile(rm, start), tile(other, start), start);
    ++counts[PRODUCT];
  } else {
    at = start;
    return false;
  }
  return true;
}

// ---- AVX512-BF16 on the vector registers that the kernel saved

struct Vectors {
  uint8_t* area;
  uint32_t offset[8];  // of XSAVE's parts

  explicit Vectors(ucontext_t* context) : area(reinterpret_cast<uint8_t*>(context->uc_mcontext.fpregs)) {
    for (unsigned part : {2u, 6u, 7u}) {
      unsigned size, place, c, d;
      __cpuid_count(13, part, size, place, c, d);
      offset[part] = place;
    }
  }
  uint64_t& present() { return *reinterpret_cast<uint64_t*>(area + 512); }
  // Part 1 of XSAVE's state (XMM), 2 (YMM), 6 and 7 (ZMM); one that is not present is all zeros.
  const uint8_t* saved(unsigned number) {
    static const uint8_t zeros[1024] = {};
    return present() >> number & 1 ? area + (number == 1 ? 160 : offset[number]) : zeros;
  }
  uint8_t* kept(unsigned number) {
    uint8_t* at = area + (number == 1 ? 160 : offset[number]);
    if (!(present() >> number & 1)) std::memset(at, 0, number == 6 ? 512 : number == 7 ? 1024 : 256);
    present() |= uint64_t(1) << number;
    return at;
  }
  void read(int number, void* out) {
    uint8_t* to = static_cast<uint8_t*>(out);
    if (number >= 16) return (void)std::memcpy(to, saved(7) + (number - 16) * 64, 64);
    std::memcpy(to, saved(1) + number * 16, 16);
    std::memcpy(to + 16, saved(2) + number * 16, 16);
    std::memcpy(to + 32, saved(6) + number * 32, 32);
  }
  void write(int number, const void* in) {
    const uint8_t* from = static_cast<const uint8_t*>(in);
    if (number >= 16) return (void)std::memcpy(kept(7) + (number - 16) * 64, from, 64);
    std::memcpy(kept(1) + number * 16, from, 16);
    std::memcpy(kept(2) + number * 16, from + 16, 16);
    std::memcpy(kept(6) + number * 32, from + 32, 32);
  }
};

uint16_t to_bfloat16(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return bits >> 16 | 0x40;              // NaN, quiet
  if (magnitude < 0x00800000) return (bits >> 16) & 0x8000;          // denormals count as 0
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

__attribute__((noinline)) void pairs(float* sums, const uint16_t* a, const uint16_t* b) {
  FlushDenormals block;
  for (int i = 0; i < 16; ++i) {
    volatile float first = __builtin_fmaf(of_bfloat16(a[2 * i + 1]), of_bfloat16(b[2 * i + 1]), sums[i]);
    sums[i] = __builtin_fmaf(of_bfloat16(a[2 * i]), of_bfloat16(b[2 * i]), first);
  }
}

bool avx512_bf16(ucontext_t* context, const uint8_t*& at) {
  if (at[0] != 0x62 || (at[1] & 15) != 2 || (at[2] & 0x84) != 0x04) return false;  // EVEX, map 0F38, W0
  const int prefix = at[2] & 3, code = at[4];
  if ((at[3] & 0xf7) != 0x40 || at[5] >> 6 != 3) return false;  // 512 bits, no mask, no broadcast, between registers
  const bool r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20), r2 = !(at[1] & 0x10), v2 = !(at[3] & 8);
  const int reg = (at[5] >> 3 & 7) | (r << 3) | (r2 << 4), rm = (at[5] & 7) | (b << 3) | (x << 4), other = (~at[2] >> 3 & 15) | (v2 << 4);
  Vectors vectors(context);
  alignas(64) uint32_t first[16], second[16];
  alignas(64) uint16_t out[32] = {};
  if (code == 0x72 && prefix == 2) {
    vectors.read(rm, first);
    for (int i = 0; i < 16; ++i) out[i] = to_bfloat16(first[i]);
    vectors.write(reg, out);
    ++counts[CONVERT];
  } else if (code == 0x72 && prefix == 3) {
    vectors.read(rm, first);
    vectors.read(other, second);
    for (int i = 0; i < 16; ++i) out[i] = to_bfloat16(first[i]), out[16 + i] = to_bfloat16(second[i]);
    vectors.write(reg, out);
    ++counts[CONVERT];
  } else if (code == 0x52 && prefix == 2) {
    alignas(64) float sums[16];
    vectors.read(reg, sums);
    vectors.read(other, first);
    vectors.read(rm, second);
    pairs(sums, reinterpret_cast<uint16_t*>(first), reinterpret_cast<uint16_t*>(second));
    vectors.write(reg, sums);
    ++counts[PAIRS];
  } else {
    return false;
  }
  at += 6;
  return true;
}

struct sigaction illegal_before, fault_before;

void pass_on(const struct sigaction& before, int signal) {
  sigaction(signal, &before, nullptr);  // the instruction faults again, and whoever was there before sees it
}

void on_illegal(int signal, siginfo_t*, void* data) {
  ucontext_t* context = static_cast<ucontext_t*>(data);
  const uint8_t* at = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  if (!amx(context, at) && !avx512_bf16(context, at)) {
    std::fprintf(stderr, "amx_trap: unknown instruction");
    for (int i = 0; i < 12; ++i) std::fprintf(stderr, " %02x", at[i]);
    std::fprintf(stderr, "\n");
    return pass_on(illegal_before, signal);
  }
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(at);
}

void on_fault(int signal, siginfo_t*, void* data) {
  ucontext_t* context = static_cast<ucontext_t*>(data);
  greg_t* registers = context->uc_mcontext.gregs;
  const uint8_t* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  if (at[0] != 0x0f || at[1] != 0xa2) return pass_on(fault_before, signal);
  const unsigned leaf = registers[REG_RAX], part = registers[REG_RCX];
  raw_syscall(SYS_arch_prctl, SET_CPUID, 1, 0, 0, 0, 0);
  unsigned a, b, c, d;
  __cpuid_count(leaf, part, a, b, c, d);
  raw_syscall(SYS_arch_prctl, SET_CPUID, 0, 0, 0, 0, 0);
  if (leaf == 7 && part == 0) a = a ? a : 1, d |= 1u << 22 | 1u << 24;  // there is a part 1; AMX-BF16, AMX-TILE
  if (leaf == 7 && part == 1) a |= 1u << 5;                             // AVX512-BF16
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  action.sa_sigaction = on_illegal;
  sigaction(SIGILL, &action, &illegal_before);
  action.sa_sigaction = on_fault;
  sigaction(SIGSEGV, &action, &fault_before);
}

}  // namespace

// Takes the place of libc's: grants the tile registers, or refuses them with the error number in GRIT_TRAP_REFUSAL, and passes on
// everything else.
EXPORT long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& value : a) value = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && a[0] == REQUEST_PERMISSION && a[1] == TILE_DATA) {
    const char* refusal = std::getenv("GRIT_TRAP_REFUSAL");
    if (refusal) errno = std::atoi(refusal);
    return refusal ? -1 : 0;
  }
  if (number == SYS_arch_prctl && a[0] == GET_PERMISSION) {
    *reinterpret_cast<unsigned long*>(a[1]) = 1ul << TILE_DATA;
    return 0;
  }
  const long result = raw_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  if (result >= 0 || result < -4095) return result;
  errno = -result;
  return -1;
}

// From now on CPUID says in this thread that there is AMX, or no longer; returns 0, or -1 where CPUID cannot be made to fault.
EXPORT int grit_trap_show_amx(int shown) { return raw_syscall(SYS_arch_prctl, SET_CPUID, !shown, 0, 0, 0, 0) ? -1 : 0; }

// How many instructions of each kind were computed so far: CONFIGURE, RELEASE, ZERO, LOAD, STORE, PRODUCT, CONVERT, PAIRS.
EXPORT int64_t grit_trap_count(int kind) { return kind >= 0 && kind < KINDS ? counts[kind].load() : -1; }

// Threads whose tiles are configured now.
EXPORT int64_t grit_trap_configured_threads() { return configured_threads.load(); }
