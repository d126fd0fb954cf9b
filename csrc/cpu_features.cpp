// Answers whether this processor can run csrc/cpu, before any of it runs.
//
// This file is compiled for the baseline instruction set, so that it can say no on a processor that
// would stop the rest with SIGILL. CMake asks the compiler which feature macros RAPFAST_CPU_ARCH
// switches on (also for "native") and hands their names over in RAPFAST_CPU_REQUIRES; the table
// below says where CPUID answers for each of them.
#include "cpu_features.h"

#include <cstdint>
#include <cstring>

#include "build_config.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rapfast {
#if defined(__x86_64__)
namespace {

enum Register { kEax, kEbx, kEcx, kEdx };

// Register state that the operating system must save for a feature to be usable: bits of XCR0.
constexpr uint64_t kNone = 0;
constexpr uint64_t kYmm = 0x6;       // XMM and YMM
constexpr uint64_t kZmm = 0xe6;      // those, the mask registers and ZMM
constexpr uint64_t kApx = 1u << 19;  // the sixteen further general registers

struct Feature {
  const char* macro;  // the compiler's macro without the underscores around it
  uint32_t leaf;      // CPUID leaf and subleaf
  uint32_t subleaf;
  Register reg;
  int bit;
  uint64_t state;
};

// Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E for 0x80000001. Only what a compiler
// emits unasked.
constexpr Feature kFeatures[] = {
    {"SSE3", 1, 0, kEcx, 0, kNone},
    {"SSSE3", 1, 0, kEcx, 9, kNone},
    {"FMA", 1, 0, kEcx, 12, kYmm},
    {"SSE4_1", 1, 0, kEcx, 19, kNone},
    {"SSE4_2", 1, 0, kEcx, 20, kNone},
    {"MOVBE", 1, 0, kEcx, 22, kNone},
    {"POPCNT", 1, 0, kEcx, 23, kNone},
    {"AVX", 1, 0, kEcx, 28, kYmm},
    {"F16C", 1, 0, kEcx, 29, kYmm},
    {"LZCNT", 0x80000001, 0, kEcx, 5, kNone},
    {"FMA4", 0x80000001, 0, kEcx, 16, kYmm},
    {"XOP", 0x80000001, 0, kEcx, 11, kYmm},
    {"TBM", 0x80000001, 0, kEcx, 21, kNone},
    {"BMI", 7, 0, kEbx, 3, kNone},
    {"AVX2", 7, 0, kEbx, 5, kYmm},
    {"BMI2", 7, 0, kEbx, 8, kNone},
    {"AVX512F", 7, 0, kEbx, 16, kZmm},
    {"AVX512DQ", 7, 0, kEbx, 17, kZmm},
    {"AVX512IFMA", 7, 0, kEbx, 21, kZmm},
    {"AVX512CD", 7, 0, kEbx, 28, kZmm},
    {"AVX512BW", 7, 0, kEbx, 30, kZmm},
    {"AVX512VL", 7, 0, kEbx, 31, kZmm},
    {"AVX512VBMI", 7, 0, kEcx, 1, kZmm},
    {"AVX512VBMI2", 7, 0, kEcx, 6, kZmm},
    {"GFNI", 7, 0, kEcx, 8, kNone},
    {"VAES", 7, 0, kEcx, 9, kYmm},
    {"VPCLMULQDQ", 7, 0, kEcx, 10, kYmm},
    {"AVX512VNNI", 7, 0, kEcx, 11, kZmm},
    {"AVX512BITALG", 7, 0, kEcx, 12, kZmm},
    {"AVX512VPOPCNTDQ", 7, 0, kEcx, 14, kZmm},
    {"AVX512VP2INTERSECT", 7, 0, kEdx, 8, kZmm},
    {"AVX512FP16", 7, 0, kEdx, 23, kZmm},
    {"AVXVNNI", 7, 1, kEax, 4, kYmm},
    {"AVX512BF16", 7, 1, kEax, 5, kZmm},
    {"AVXIFMA", 7, 1, kEax, 23, kYmm},
    {"AVXVNNIINT8", 7, 1, kEdx, 4, kYmm},
    {"AVXVNNIINT16", 7, 1, kEdx, 10, kYmm},
    {"APX_F", 7, 1, kEdx, 21, kApx},
};

// Whether `word` is one of the space-separated words of `list`.
bool contains_word(const char* list, const char* word) {
  const size_t length = std::strlen(word);
  for (const char* at = std::strstr(list, word); at != nullptr; at = std::strstr(at + 1, word)) {
    const bool starts = at == list || at[-1] == ' ';
    const bool ends = at[length] == '\0' || at[length] == ' ';
    if (starts && ends) return true;
  }
  return false;
}

// The register state that the operating system saves (XCR0); 0 where it does not tell.
uint64_t saved_state() {
  uint32_t regs[4];
  constexpr uint32_t kOsxsave = 1u << 27;
  if (!__get_cpuid(1, &regs[kEax], &regs[kEbx], &regs[kEcx], &regs[kEdx]) ||
      !(regs[kEcx] & kOsxsave))
    return 0;
  uint32_t low, high;
  // The intrinsic would need -mxsave, which this file must not be compiled with.
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

bool has(const Feature& feature, uint64_t state) {
  uint32_t regs[4];
  // __get_cpuid_count answers false where the processor knows no such leaf.
  if (!__get_cpuid_count(feature.leaf, feature.subleaf, &regs[kEax], &regs[kEbx], &regs[kEcx],
                         &regs[kEdx]))
    return false;
  return (regs[feature.reg] >> feature.bit & 1u) && (state & feature.state) == feature.state;
}

}  // namespace

std::vector<std::string> cpu_missing_features() {
  std::vector<std::string> missing;
  const uint64_t state = saved_state();
  for (const Feature& feature : kFeatures) {
    if (contains_word(RAPFAST_CPU_REQUIRES, feature.macro) && !has(feature, state))
      missing.emplace_back(feature.macro);
  }
  return missing;
}
#else
// Elsewhere csrc/cpu is compiled for the platform's baseline, which every processor of the platform
// has.
std::vector<std::string> cpu_missing_features() { return {}; }
#endif

}  // namespace rapfast
