// A training step without Python in the graph of autograd: what `_BatchNorm` in autograd.py does, for plain layers.
//
// torch's C++ for autograd has no stable ABI. So this library is one of its own, and is loaded by that torch alone which
// it was compiled with; everything else is in _native.so. Operators are called boxed, which is quicker to compile than typed
// calls.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <iterator>
#include <optional>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;
using OptionalTensor = std::optional<Tensor>;

// The arguments of `train`, which are those of `forward_commit`; of `train_domains`, from MASK on, which are those of
// `forward` and then STATISTICS and MOMENTUM.
enum { X, WEIGHT, BIAS, RESIDUAL, EPS, CHANNEL_DIM, ACTIVATION, MASK, DOMAIN_OF, DOMAINS, STATISTICS, MOMENTUM };
constexpr int INPUTS = EPS;  // those that gradients are for come first
constexpr int OF_TRAIN = 13, OF_TRAIN_DOMAINS = 12;

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

IValue value(const Tensor& t) { return t.defined() ? IValue(t) : IValue(); }
Tensor tensor(const IValue& v) { return v.isNone() ? Tensor() : v.toTensor(); }

// y, count, mean and m2 take the place of the arguments. Nothing of torch's is switched off around it: autograd has no
// part in these operators anyway, and dispatch modes are to see them as they are called from Python.
void forward_commit(Stack& arguments) {
  static const auto op = find("batchnorm::forward_commit");
  op.callBoxed(arguments);
}

// The same of samples of several domains, with a commit for each. STATISTICS has four tensors for each domain, or none.
void forward_commit_domains(Stack& arguments) {
  static const auto forward = find("batchnorm::forward"), commit = find("batchnorm::commit");
  const IValue momentum = std::move(arguments[MOMENTUM]);
  const std::vector<Tensor> statistics = arguments[STATISTICS].toTensorVector();
  arguments.resize(STATISTICS);
  forward.callBoxed(arguments);
  Stack& result = arguments;
  for (size_t i = 0; i + 4 <= statistics.size(); i += 4) {
    Stack of_domain(statistics.begin() + i, statistics.begin() + i + 4);
    of_domain.insert(of_domain.end(), {result[1], result[2], result[3], momentum, static_cast<int64_t>(i / 4)});
    commit.callBoxed(of_domain);
  }
}

struct BatchNorm : torch::autograd::Function<BatchNorm> {
  static constexpr bool is_traceable = true;  // for compiled autograd: nothing but operators is called

  // The inputs are in the arguments, too: here torch sees them.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, Stack* arguments) {
    const IValue eps = (*arguments)[EPS], channel_dim = (*arguments)[CHANNEL_DIM], mask = (*arguments)[MASK];
    const IValue activation = (*arguments)[ACTIVATION];
    IValue domain, domains = 1;
    if (arguments->size() == OF_TRAIN_DOMAINS) {
      domain = (*arguments)[DOMAIN_OF], domains = (*arguments)[DOMAINS];
      forward_commit_domains(*arguments);
    } else {
      forward_commit(*arguments);
    }
    Stack& result = *arguments;
    // Without an activation the residual's value has no part in any gradient.
    ctx->save_for_backward({x, result[1].toTensor(), result[2].toTensor(), result[3].toTensor(),
                            weight.value_or(Tensor()), bias.value_or(Tensor()),
                            activation.isNone() ? Tensor() : residual.value_or(Tensor()), tensor(mask),
                            tensor(domain)});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["channel_dim"] = channel_dim;
    ctx->saved_data["activation"] = activation;
    ctx->saved_data["domains"] = domains;
    ctx->saved_data["residual"] = residual.has_value();
    return result[0].toTensor();
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto& options = ctx->saved_data;
    const IValue& activation = options.at("activation");
    const bool given[INPUTS] = {true, saved[4].defined(), saved[5].defined(), options.at("residual").toBool()};
    bool needed[INPUTS];
    for (int i = 0, edge = 0; i < INPUTS; ++i) needed[i] = given[i] && ctx->needs_input_grad(edge++);

    variable_list gradients(INPUTS + 1);  // nothing for `arguments`
    Stack stack{grads[0], saved[0]};
    const bool graph = at::GradMode::is_enabled();
    if (!graph) stack.insert(stack.end(), {saved[1], saved[2], saved[3]});
    stack.insert(stack.end(), {value(saved[4]), value(saved[5]), value(saved[6]), options.at("eps"),
                               options.at("channel_dim"), activation, value(saved[7])});
    if (graph) {  // the gradients with a graph of their own: in Python, where autograd sees through them
      static const auto op = find("batchnorm::train_gradients");
      stack.emplace_back(c10::List<bool>({needed[X], needed[WEIGHT], needed[BIAS], needed[RESIDUAL]}));
      stack.insert(stack.end(), {value(saved[8]), options.at("domains")});
      op.callBoxed(stack);
      const auto found = stack[0].toTensorVector();
      for (int i = 0, next = 0; i < INPUTS; ++i)
        if (needed[i]) gradients[i] = found.at(next++);
      return gradients;
    }
    static const auto op = find("batchnorm::backward");
    stack.push_back(value(saved[8]));
    op.callBoxed(stack);
    for (int i = 0; i < INPUTS; ++i)
      if (needed[i]) gradients[i] = stack[i].toTensor();
    if (needed[RESIDUAL] && activation.isNone()) gradients[RESIDUAL] = grads[0];
    return gradients;
  }
};

template <int ARGUMENTS>
void train(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
  const auto first = stack->end() - ARGUMENTS;
  Stack arguments(std::make_move_iterator(first), std::make_move_iterator(stack->end()));
  stack->erase(first, stack->end());
  OptionalTensor inputs[INPUTS];
  bool recorded = false;
  for (int i = 0; i < INPUTS; ++i) {
    if (arguments[i].isTensor()) inputs[i] = arguments[i].toTensor();
    recorded |= inputs[i] && inputs[i]->requires_grad();
  }
  if (recorded && at::GradMode::is_enabled()) {
    stack->emplace_back(BatchNorm::apply(*inputs[X], inputs[WEIGHT], inputs[BIAS], inputs[RESIDUAL], &arguments));
    return;
  }
  if constexpr (ARGUMENTS == OF_TRAIN_DOMAINS)
    forward_commit_domains(arguments);
  else
    forward_commit(arguments);
  stack->push_back(std::move(arguments[0]));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(batchnorm, m) {
  m.def(
      "train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int channel_dim, str? activation, "
      "Tensor? mask, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "Tensor(d!)? num_batches_skipped, float? momentum) -> Tensor");
  m.def(
      "train_domains(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int channel_dim, "
      "str? activation, Tensor? mask, Tensor domain, int domains, Tensor(a!)[] statistics, float? momentum) -> Tensor");
}

TORCH_LIBRARY_IMPL(batchnorm, CompositeImplicitAutograd, m) {
  m.impl("train", torch::CppFunction::makeFromBoxedFunction<&train<OF_TRAIN>>());
  m.impl("train_domains", torch::CppFunction::makeFromBoxedFunction<&train<OF_TRAIN_DOMAINS>>());
}

// In inference mode, where autograd is not asked, a dispatch mode would be shown these operators, not their parts.
TORCH_LIBRARY_IMPL(batchnorm, Python, m) {
  m.impl("train", torch::CppFunction::makeFromBoxedFunction<&train<OF_TRAIN>>());
  m.impl("train_domains", torch::CppFunction::makeFromBoxedFunction<&train<OF_TRAIN_DOMAINS>>());
}
