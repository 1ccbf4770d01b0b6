// The operations on torch's tensors. What each means is written in kernels/reference.py, the schemas are in ops.py,
// the loops in kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "normalization.hpp"
#include "output.hpp"
#include "passes.hpp"
#include "running.hpp"
#include "schedule.hpp"
#include "tensors.hpp"

namespace batchnorm {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_moments(const Tensor& x, int64_t channel_dim, const OptionalTensor& mask) {
  const Input input(x, channel_dim);
  const Schedule schedule(input.walk, input.tensor.element_size());
  const MomentsOf moments(input, channel_dim, schedule.repeat(), mask);
  schedule.reduce([&](const Walk& w, int64_t begin, int64_t end, Sums s) { moments.add(w, begin, end, s); },
                  [&](int64_t c, double first, double second) { moments.finish(c, first, second); });
  return {moments.count, moments.mean, moments.m2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& residual,
                                                   double eps, int64_t channel_dim, const OptionalString& activation,
                                                   const OptionalTensor& mask) {
  const Input input(x, channel_dim);
  const Schedule schedule(input.walk, input.tensor.element_size());
  const MomentsOf moments(input, channel_dim, schedule.repeat(), mask);
  Normalization norm(input, schedule.repeat(), weight, bias, eps, activation);
  const Applied apply(input, norm, residual, Output::like(input.tensor, input.walk));
  schedule.reduce_then(
      schedule.blocks() && !apply.in_order(),
      [&](const Walk& w, int64_t begin, int64_t end, Sums s) { moments.add(w, begin, end, s); },
      [&](int64_t c, double first, double second) {
        moments.finish(c, first, second);
        norm.set(c, moments.mean_of(c), moments.variance_of(c));
      },
      apply);
  return {apply.y(), moments.count, moments.mean, moments.m2};
}

Tensor normalize_into(const Input& input, Output output, const Tensor& mean, const Tensor& var,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      double eps, const OptionalString& activation) {
  const Schedule schedule(input.walk, input.tensor.element_size());
  Normalization norm(input, schedule.repeat(), weight, bias, eps, activation);
  norm.set_all(mean, var);
  const Applied apply(input, norm, residual, std::move(output));
  schedule.each(apply);
  return apply.y();
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual, double eps, int64_t channel_dim,
                 const OptionalString& activation) {
  const Input input(x, channel_dim);
  return normalize_into(input, Output::like(input.tensor, input.walk), mean, var, weight, bias, residual, eps, activation);
}

void normalize_(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                const OptionalTensor& bias, const OptionalTensor& residual, double eps, int64_t channel_dim,
                const OptionalString& activation) {
  const Input input(x, channel_dim);
  const bool copied = input.tensor.data_ptr() != x.data_ptr();
  const Tensor y = normalize_into(input, Output{input.tensor}, mean, var, weight, bias, residual, eps, activation);
  if (copied) {
    Tensor target = x;
    torch::stable::copy_(target, y);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& residual, double eps, int64_t channel_dim,
                                         const OptionalString& activation, const OptionalTensor& mask) {
  const Gradient g(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation, mask);
  GradientSums sums(g);
  g.schedule.reduce([&](const Walk& w, int64_t begin, int64_t end, Sums s) { sums.add(w, begin, end, s); },
                    [&](int64_t c, double first, double second) { sums.finish(c, first, second); });
  return {sums.sum_dz(), sums.sum_dz_xhat()};
}

std::tuple<Tensor, Tensor> backward_input(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& residual, double eps, int64_t channel_dim,
                                          const OptionalString& activation, const OptionalTensor& mean_dz,
                                          const OptionalTensor& mean_dz_xhat, const OptionalTensor& mask) {
  Gradient g(dy, x, mean, var, weight, bias, residual, eps, channel_dim, activation, mask);
  const int64_t channels = g.input.walk.channels;
  const auto first = read(mean_dz, channels, "mean_dz", 0), second = read(mean_dz_xhat, channels, "mean_dz_xhat", 0);
  for (int64_t c = 0; c < channels; ++c) g.set_slope(c, first[c], second[c]);
  const Differentiated apply(g);
  g.schedule.each(apply);
  return {apply.dx(), apply.dresidual()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& count,
                                                    const Tensor& mean, const Tensor& m2, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, const OptionalTensor& residual,
                                                    double eps, int64_t channel_dim, const OptionalString& activation,
                                                    const OptionalTensor& mask) {
  const double total = read_count(count), n = total > 0 ? total : 1;
  Gradient g(dy, x, mean, m2, weight, bias, residual, eps, channel_dim, activation, mask, n);
  GradientSums sums(g);
  const Differentiated apply(g);
  g.schedule.reduce_then(
      g.schedule.blocks() && !apply.in_order(),
      [&](const Walk& w, int64_t begin, int64_t end, Sums s) { sums.add(w, begin, end, s); },
      [&](int64_t c, double first, double second) {
        sums.finish(c, first, second);
        g.set_slope(c, sums.sum_of(c) / n, sums.product_of(c) / n);
      },
      apply);
  return {apply.dx(), sums.sum_dz_xhat(weight), sums.sum_dz(bias), apply.dresidual()};
}

// --- running statistics ----------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_commit(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    double eps, int64_t channel_dim, const OptionalString& activation, const OptionalTensor& mask,
    const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& num_batches_tracked,
    const OptionalTensor& num_batches_skipped, std::optional<double> momentum) {
  auto result = forward(x, weight, bias, residual, eps, channel_dim, activation, mask);
  const auto& [y, count, mean, m2] = result;
  commit(running_mean, running_var, num_batches_tracked, num_batches_skipped, count, mean, m2, momentum);
  return result;
}

}  // namespace
}  // namespace batchnorm

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("batch_moments", TORCH_BOX(&batchnorm::batch_moments));
  m.impl("normalize", TORCH_BOX(&batchnorm::normalize));
  m.impl("normalize_", TORCH_BOX(&batchnorm::normalize_));
  m.impl("forward", TORCH_BOX(&batchnorm::forward));
  m.impl("backward_sums", TORCH_BOX(&batchnorm::backward_sums));
  m.impl("backward_input", TORCH_BOX(&batchnorm::backward_input));
  m.impl("backward", TORCH_BOX(&batchnorm::backward));
  m.impl("commit", TORCH_BOX(&batchnorm::commit));
  m.impl("forward_commit", TORCH_BOX(&batchnorm::forward_commit));
}

// For Python, by ctypes: whether outputs lie in the pool from now on. Returns what was.
extern "C" __attribute__((visibility("default"))) bool batchnorm_use_pool(bool use) {
  return batchnorm::Pool::instance().serves.exchange(use);
}
