// The kernels of the instruction set in use.
#pragma once

#include <string>

#include "loops/kernels.hpp"

namespace batchnorm {

// The kernels for a dtype.
const Kernels& kernels(Dtype dtype);

// The index of an activation in `Level::activations`, the same in all levels; -1 if there is none of this name.
int find_activation(const std::string& name);

}  // namespace batchnorm
