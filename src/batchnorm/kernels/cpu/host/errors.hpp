// Errors: RuntimeErrors in Python. Their text is the message alone: torch's own macros would add a file of the machine
// that the extension was built on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace batchnorm {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "batchnorm: ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

inline std::string dtype_name(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(t.scalar_type());
  }
}

// What came, for a message: dtype, shape, and a device that is not the CPU.
inline std::string described(const torch::stable::Tensor& t) {
  std::ostringstream text;
  text << dtype_name(t) << " of shape (";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << (t.dim() == 1 ? ",)" : ")");
  if (!t.is_cpu()) text << " on another device than the CPU";
  return text.str();
}

}  // namespace
}  // namespace batchnorm
