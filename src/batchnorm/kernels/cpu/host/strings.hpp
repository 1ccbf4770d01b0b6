// Strings as arguments of operators.
//
// An operator's parameter is torch's handle, not std::string: torch's conversion to that, up to 2.13 at least, leaks a
// copy at every call.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace batchnorm {
namespace {

// The string of a handle, which is freed: once for each argument.
std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string value(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return value;
}

}  // namespace
}  // namespace batchnorm
