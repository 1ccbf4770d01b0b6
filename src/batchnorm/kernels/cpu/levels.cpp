// Which instruction set the kernels use: the best that the machine has, decided when the extension is loaded.
#include <cstring>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace batchnorm {

#define BN_DECLARE(level)          \
  namespace level {                \
  extern const Kernels kernels[4]; \
  }

#if defined(__x86_64__)
BN_DECLARE(sse2)
BN_DECLARE(avx2)
BN_DECLARE(avx512)
#else
BN_DECLARE(generic)
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;  // in the order of Dtype
};

// The levels that run on this machine, the best last.
std::vector<Level> available() {
#if defined(__x86_64__)
  std::vector<Level> levels{{"sse2", sse2::kernels}};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.push_back({"avx2", avx2::kernels});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      levels.push_back({"avx512", avx512::kernels});
  }
  return levels;
#else
  return {{"generic", generic::kernels}};
#endif
}

Level current = available().back();

}  // namespace

const Kernels& kernels(Dtype dtype) { return current.kernels[static_cast<int>(dtype)]; }

}  // namespace batchnorm

// For Python, by ctypes: no tensors pass here.
extern "C" {

__attribute__((visibility("default"))) const char* batchnorm_levels() {
  static const std::string names = [] {
    std::string joined;
    for (const auto& level : batchnorm::available()) joined.append(joined.empty() ? "" : " ").append(level.name);
    return joined;
  }();
  return names.c_str();
}

__attribute__((visibility("default"))) const char* batchnorm_level() { return batchnorm::current.name; }

__attribute__((visibility("default"))) bool batchnorm_use_level(const char* name) {
  for (const auto& level : batchnorm::available())
    if (std::strcmp(level.name, name) == 0) {
      batchnorm::current = level;
      return true;
    }
  return false;
}

}  // extern "C"
