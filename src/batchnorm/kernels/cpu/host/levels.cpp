// Which instruction set the kernels use: the best that the machine has, decided when the extension is loaded.
#include "host/levels.hpp"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>
#include <vector>

#include "host/guarded.hpp"
#include "host/strings.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {

#define BN_DECLARE(instruction_set) \
  namespace instruction_set {       \
  extern const Level level;         \
  }

// Which there are is the build's choice.
#if defined(BN_HAS_sse2)
BN_DECLARE(sse2)
#endif
#if defined(BN_HAS_avx2)
BN_DECLARE(avx2)
#endif
#if defined(BN_HAS_avx512)
BN_DECLARE(avx512)
#endif
#if defined(BN_HAS_generic)
BN_DECLARE(generic)
#endif

namespace {

// The levels that run on this machine, the best last.
std::vector<const Level*> available() {
  std::vector<const Level*> levels;
#if defined(BN_HAS_generic)
  levels.push_back(&generic::level);
#endif
#if defined(BN_HAS_sse2)
  levels.push_back(&sse2::level);
#endif
#if defined(BN_HAS_avx2)
  const bool avx2_runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2_runs) levels.push_back(&avx2::level);
#endif
#if defined(BN_HAS_avx512)
  if (avx2_runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    levels.push_back(&avx512::level);
#endif
  return levels;
}

std::atomic<const Level*> current = available().back();  // another thread may choose while kernels run

// --- for Python ------------------------------------------------------------------------------------------------------

std::string cpu_levels() {
  std::string names;
  for (const Level* level : available()) names.append(names.empty() ? "" : " ").append(level->name);
  return names;
}

std::string cpu_level() { return current.load()->name; }

std::string cpu_activations() {
  std::string names;
  const char* const* activations = current.load()->activations;
  for (int i = 1; activations[i] != nullptr; ++i) names.append(names.empty() ? "" : " ").append(activations[i]);
  return names;
}

bool use_cpu_level(StringHandle name) {
  const std::string wanted = take_string(name);
  for (const Level* level : available())
    if (level->name == wanted) {
      current = level;
      return true;
    }
  return false;
}

}  // namespace

const Kernels& kernels(Dtype dtype) { return current.load(std::memory_order_relaxed)->kernels[static_cast<int>(dtype)]; }

int find_activation(const std::string& name) {
  const char* const* activations = current.load(std::memory_order_relaxed)->activations;
  for (int i = 0; activations[i] != nullptr; ++i)
    if (name == activations[i]) return i;
  return -1;
}

}  // namespace batchnorm

STABLE_TORCH_LIBRARY_FRAGMENT(batchnorm, m) {
  m.def("_cpu_levels() -> str");  // separated by spaces, the best last
  m.def("_cpu_level() -> str");   // the one in use
  m.def("_cpu_activations() -> str");  // those that there are kernels for, separated by spaces
  m.def("_use_cpu_level(str name) -> bool");  // false if this machine has no such level
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CompositeExplicitAutograd, m) {
  m.impl("_cpu_levels", BN_BOX(batchnorm::cpu_levels));
  m.impl("_cpu_level", BN_BOX(batchnorm::cpu_level));
  m.impl("_cpu_activations", BN_BOX(batchnorm::cpu_activations));
  m.impl("_use_cpu_level", BN_BOX(batchnorm::use_cpu_level));
}
