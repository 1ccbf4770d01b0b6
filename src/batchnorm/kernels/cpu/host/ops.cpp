// The operations on torch's tensors. What each means is written in kernels/reference.py, the schemas are in ops.py,
// the loops in loops/.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "host/domains.hpp"
#include "host/guarded.hpp"
#include "host/memory_limit.hpp"
#include "host/normalization.hpp"
#include "host/output.hpp"
#include "host/passes.hpp"
#include "host/pool.hpp"
#include "host/running_statistics.hpp"
#include "host/schedule.hpp"
#include "host/tensors.hpp"
#include "loops/kernels.hpp"

namespace batchnorm {
namespace {

std::tuple<Tensor, Tensor, Tensor> batch_moments(const Tensor& x, int64_t channel_dim, const OptionalTensor& mask,
                                                 const OptionalTensor& domain, int64_t domains_) {
  const Input input(x, channel_dim, domain ? Order::outputs : Order::own);
  const Domains domains(input, channel_dim, domain, domains_);
  const Schedule schedule(input, domains);
  MomentsPass moments(input, domains, channel_dim, schedule, mask);
  schedule.reduce([&](const Extents& e, int64_t begin, int64_t end, Sums s) { moments.add(e, begin, end, s); },
                  [&](int64_t c, double first, double second) { return moments.finish(c, first, second); });
  return {moments.count, moments.mean, moments.m2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_of(const Tensor& x, const OptionalTensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& residual,
                                                      double eps, int64_t channel_dim, int activation,
                                                      const OptionalTensor& mask, const OptionalTensor& domain,
                                                      int64_t domains_) {
  const Input input(x, channel_dim, Order::outputs);
  const Domains domains(input, channel_dim, domain, domains_);
  const Schedule schedule(input, domains);
  MomentsPass moments(input, domains, channel_dim, schedule, mask);
  Normalization norm(input, domains, schedule.repeat(), weight, bias, eps, activation);
  const ApplyPass apply(input, domains, schedule, norm, residual, Output::like(input), true);
  schedule.reduce_then(
      schedule.blocks() && !apply.in_order(),
      [&](const Extents& e, int64_t begin, int64_t end, Sums s) { moments.add(e, begin, end, s); },
      [&](int64_t c, double first, double second) {
        const bool again = moments.finish(c, first, second);
        norm.set(c, moments.mean_of(c), moments.variance_of(c));
        return again;
      },
      apply);
  return {apply.y(), moments.count, moments.mean, moments.m2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const OptionalTensor& residual,
                                                   double eps, int64_t channel_dim, const OptionalString& activation,
                                                   const OptionalTensor& mask, const OptionalTensor& domain,
                                                   int64_t domains) {
  return forward_of(x, weight, bias, residual, eps, channel_dim, take_activation(activation), mask, domain, domains);
}

Tensor normalize_into(const Input& input, Output output, const Tensor& mean, const Tensor& var,
                      const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                      double eps, int activation, const Domains& domains) {
  const Schedule schedule(input, domains);
  Normalization norm(input, domains, schedule.repeat(), weight, bias, eps, activation);
  norm.set_all(mean, var);
  const ApplyPass apply(input, domains, schedule, norm, residual, std::move(output), false);
  schedule.each(apply);
  return apply.y();
}

Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual, double eps, int64_t channel_dim,
                 const OptionalString& activation, const OptionalTensor& domain) {
  const int index = take_activation(activation);
  const Input input(x, channel_dim, Order::outputs);
  const Domains domains(input, channel_dim, domain, mean.dim() == 2 ? mean.size(0) : 1);
  Output output = Output::like(input);
  return normalize_into(input, std::move(output), mean, var, weight, bias, residual, eps, index, domains);
}

void normalize_(const Tensor& x, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
                const OptionalTensor& bias, const OptionalTensor& residual, double eps, int64_t channel_dim,
                const OptionalString& activation) {
  const int index = take_activation(activation);
  check_writable(x, "x");
  const Input input(x, channel_dim, Order::own);
  const bool copied = input.tensor.data_ptr() != x.data_ptr();
  // Statistics and parameters are read before anything is written, and so is all that is copied.
  OptionalTensor aligned = input.aligned(residual, "residual");
  if (!copied) {
    check_apart(x, mean, "mean"), check_apart(x, var, "var");
    if (weight) check_apart(x, *weight, "weight");
    if (bias) check_apart(x, *bias, "bias");
    if (residual && same_place(x, *residual))
      aligned = input.copy(*residual);  // a kernel may read values again that it has written over
    else if (residual)
      check_apart(x, *residual, "residual");
  }
  const Domains one(input, channel_dim, std::nullopt, 1);
  const Tensor y = normalize_into(input, Output{input.tensor}, mean, var, weight, bias, aligned, eps, index, one);
  if (copied) {
    Tensor target = x;
    torch::stable::copy_(target, y);
  }
}

// --- backward --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> backward_sums(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& residual, double eps, int64_t channel_dim,
                                         const OptionalString& activation, const OptionalTensor& mask,
                                         const OptionalTensor& domain) {
  BackwardInputs b(dy, x, mean, weight, bias, residual, eps, channel_dim, take_activation(activation), mask, domain);
  b.norm.set_all(mean, var);
  SumsPass sums(b);
  b.schedule.reduce([&](const Extents& e, int64_t begin, int64_t end, Sums s) { sums.add(e, begin, end, s); },
                    [&](int64_t c, double first, double second) { return sums.finish(c, first, second); });
  return {sums.sum_dz(), sums.sum_dz_xhat()};
}

std::tuple<Tensor, Tensor> backward_input(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& residual, double eps, int64_t channel_dim,
                                          const OptionalString& activation, const OptionalTensor& mean_dz,
                                          const OptionalTensor& mean_dz_xhat, const OptionalTensor& mask,
                                          const OptionalTensor& domain) {
  BackwardInputs b(dy, x, mean, weight, bias, residual, eps, channel_dim, take_activation(activation), mask, domain);
  b.norm.set_all(mean, var);
  const int64_t channels = b.input.extents.channels;
  const auto first = read_table(mean_dz, b.domains, channels, "mean_dz", 0);
  const auto second = read_table(mean_dz_xhat, b.domains, channels, "mean_dz_xhat", 0);
  for (int64_t c = 0; c < b.entries(); ++c) b.set_grad(c, first[c], second[c]);
  const GradPass apply(b, false, !mean_dz || !mean_dz_xhat);
  b.schedule.each(apply);
  return {apply.dx(), apply.dresidual()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& count,
                                                    const Tensor& mean, const Tensor& m2, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, const OptionalTensor& residual,
                                                    double eps, int64_t channel_dim, const OptionalString& activation,
                                                    const OptionalTensor& mask, const OptionalTensor& domain) {
  const int index = take_activation(activation);
  BackwardInputs b(dy, x, mean, weight, bias, residual, eps, channel_dim, index, mask, domain);
  std::vector<double> counts = read_counts(count, b.domains);
  for (double& n : counts) n = n > 0 ? n : 1;
  b.norm.set_all(mean, m2, counts);
  SumsPass sums(b);
  const GradPass apply(b, true, false);
  b.schedule.reduce_then(
      b.schedule.blocks() && !apply.in_order(),
      [&](const Extents& e, int64_t begin, int64_t end, Sums s) { sums.add(e, begin, end, s); },
      [&](int64_t c, double first, double second) {
        const bool again = sums.finish(c, first, second);
        const double n = counts.size() == 1 ? counts[0] : counts[c / b.input.extents.channels];
        b.set_grad(c, sums.sum_of(c) / n, sums.product_of(c) / n);
        return again;
      },
      apply);
  return {apply.dx(), sums.sum_dz_xhat(weight), sums.sum_dz(bias), apply.dresidual()};
}

// --- running statistics ----------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_commit(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    double eps, int64_t channel_dim, const OptionalString& activation, const OptionalTensor& mask,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
    const OptionalTensor& num_batches_skipped, std::optional<double> momentum) {
  if (running_mean.has_value() != running_var.has_value())
    refuse("got running_mean without running_var, or the other way round; give both, or None for both");
  auto result =
      forward_of(x, weight, bias, residual, eps, channel_dim, take_activation(activation), mask, std::nullopt, 1);
  const auto& [y, count, mean, m2] = result;
  if (running_mean)
    commit(*running_mean, *running_var, num_batches_tracked, num_batches_skipped, count, mean, m2, momentum,
           std::nullopt);
  return result;
}

// --- memory of outputs -----------------------------------------------------------------------------------------------

bool output_pool() { return Pool::instance().enabled(); }

// A number that nobody else has, for `set_outputs_elsewhere`.
int64_t new_number() {
  static std::atomic<int64_t> last = 0;
  return ++last;
}

// Two operators: torch's compiler may call one twice while it traces, which then changes nothing.
void set_outputs_elsewhere(int64_t who, bool wanted) { Pool::instance().set_elsewhere(who, wanted); }
void set_output_pool_limit(int64_t bytes) { Pool::instance().set_limit(static_cast<size_t>(bytes)); }

// At most what int64 holds.
int64_t memory_limit_below(StringHandle root) {
  return static_cast<int64_t>(std::min<uint64_t>(memory_limit(take_string(root)), INT64_MAX));
}

}  // namespace
}  // namespace batchnorm

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("batch_moments", BN_BOX(batchnorm::batch_moments));
  m.impl("normalize", BN_BOX(batchnorm::normalize));
  m.impl("normalize_", BN_BOX(batchnorm::normalize_));
  m.impl("forward", BN_BOX(batchnorm::forward));
  m.impl("backward_sums", BN_BOX(batchnorm::backward_sums));
  m.impl("backward_input", BN_BOX(batchnorm::backward_input));
  m.impl("backward", BN_BOX(batchnorm::backward));
  m.impl("commit", BN_BOX(batchnorm::commit));
  m.impl("forward_commit", BN_BOX(batchnorm::forward_commit));
}

STABLE_TORCH_LIBRARY_FRAGMENT(batchnorm, m) {
  m.def("_cpu_output_pool() -> bool");  // whether outputs lie in it
  m.def("_cpu_new_number() -> int");
  m.def("_cpu_set_outputs_elsewhere(int who, bool wanted) -> ()");
  m.def("_cpu_set_output_pool_limit(int bytes) -> ()");
  m.def("_cpu_memory_limit(str root) -> int");  // root: where the system's files are, "" for its own
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CompositeExplicitAutograd, m) {
  m.impl("_cpu_output_pool", BN_BOX(batchnorm::output_pool));
  m.impl("_cpu_new_number", BN_BOX(batchnorm::new_number));
  m.impl("_cpu_set_outputs_elsewhere", BN_BOX(batchnorm::set_outputs_elsewhere));
  m.impl("_cpu_set_output_pool_limit", BN_BOX(batchnorm::set_output_pool_limit));
  m.impl("_cpu_memory_limit", BN_BOX(batchnorm::memory_limit_below));
}
