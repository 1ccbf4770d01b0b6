// The boundary of an operator: what goes wrong inside is told in words, whoever noticed it.
#pragma once

#include <torch/csrc/stable/library.h>

#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "host/errors.hpp"

// torch 2.13 and newer tell what went wrong in a call of their library. Weak, and so null in an older torch.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace batchnorm {
namespace {

template <auto F>
struct Guarded;

template <class R, class... Arguments, R (*F)(Arguments...)>
struct Guarded<F> {
  static R call(Arguments... arguments) {
    try {
      return F(std::forward<Arguments>(arguments)...);
    } catch (const std::bad_alloc&) {
      refuse("out of memory. Use a smaller batch, or give memory back first");
    } catch (const std::exception& error) {
      // torch's own checks say which call failed, and in which file of the machine that the extension was built on.
      if (std::string(error.what()).find("API call failed at") == std::string::npos) throw;
      const char* (*what)() = torch_exception_get_what_without_backtrace;
      refuse("torch failed: ", what == nullptr ? "it does not say why" : what(),
             ". Check that memory is left, and that all tensors are plain ones on the CPU");
    }
  }
};

}  // namespace
}  // namespace batchnorm

// TORCH_BOX for a function whose errors are to be told.
#define BN_BOX(function) TORCH_BOX(&batchnorm::Guarded<&function>::call)
