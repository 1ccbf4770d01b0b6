"""Tools that look for torch's class and make another layer from one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm as bn
from batchnorm.errors import OptionError
from compatibility.rows import row
from support.networks import used

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Module:
    """A network of torch.nn in inference, no statistics or parameters as they begin."""
    torch.manual_seed(0)
    return used(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))


def with_options() -> nn.Module:
    """One of ours with an activation inside."""
    torch.manual_seed(0)
    return used(nn.Sequential(nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8, activation="relu")))


def rebuilt_alike(tool: Any) -> None:
    """What a tool makes of converted and of fused models computes what it makes of torch's; and options are refused."""
    expected = tool(plain()).eval()(X)
    for ours in (bn.convert(plain()), bn.fuse(plain())):
        torch.testing.assert_close(tool(ours).eval()(X), expected)
    with pytest.raises(OptionError, match="without activation"):
        tool(with_options())
    torch.testing.assert_close(tool(bn.revert(bn.fuse(plain()))).eval()(X), expected)


@row(
    "`torch.nn.utils.fuse_conv_bn_eval`",
    "torch",
    "plain layers and fused models; a layer with an activation raises `OptionError`",
    "`fold` instead, which keeps activations and residuals",
)
def fuse_conv_bn() -> None:
    for ours in (bn.convert(plain()), bn.fuse(plain())):
        torch.testing.assert_close(fuse_conv_bn_eval(ours[0], ours[1])(X), plain()[:2](X))
    ours = with_options()
    with pytest.raises(OptionError, match="without activation"):
        fuse_conv_bn_eval(ours[0], ours[1])
    torch.testing.assert_close(bn.fold(with_options(), X)(X), with_options()(X))


@row(
    "`torch.fx.experimental.optimization.fuse`",
    "torch",
    "looks for the exact classes of torch.nn and leaves ours as they are: the same outputs, nothing folded",
    "`fold` instead",
)
def fx_optimization() -> None:
    from torch.fx.experimental.optimization import fuse

    for ours in (bn.convert(plain()), bn.fuse(plain()), with_options()):
        made = fuse(copy.deepcopy(ours))
        assert any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
        torch.testing.assert_close(made(X), ours(X))


@row(
    "`torch.utils.mkldnn.to_mkldnn`",
    "torch",
    "plain layers and fused models; a layer with an activation raises `OptionError`",
    "`revert` or `fold`",
)
def to_mkldnn() -> None:
    from torch.utils.mkldnn import to_mkldnn

    def tool(model: nn.Module) -> nn.Module:
        # Its layers take and give MKLDNN tensors.
        made = to_mkldnn(model)
        return nn.Sequential(Apply(torch.Tensor.to_mkldnn), made, Apply(torch.Tensor.to_dense))

    class Apply(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x)

    rebuilt_alike(tool)


@row(
    "mmengine, `convert_sync_batchnorm`, `revert_sync_batchnorm`",
    "mmengine",
    "plain layers and fused models; a layer with an option raises `OptionError`",
    "`convert(sync=True)` instead",
)
def mmengine_sync() -> None:
    from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm

    rebuilt_alike(convert_sync_batchnorm)
    rebuilt_alike(lambda model: revert_sync_batchnorm(convert_sync_batchnorm(model)))
    shared = bn.convert(plain(), sync=True)
    torch.testing.assert_close(revert_sync_batchnorm(shared)(X), plain()(X))  # they need no other processes


@row(
    "mmengine, `turn_on_efficient_conv_bn_eval`",
    "mmengine",
    "plain layers and fused models; a layer with an activation raises `OptionError` when it is called",
    "`fold`",
)
def mmengine_efficient_eval() -> None:
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model as turn_on

    expected = plain()(X)
    for ours in (bn.convert(plain()), bn.fuse(plain())):
        turn_on(ours)
        torch.testing.assert_close(ours(X), expected)
    ours = with_options()
    turn_on(ours)
    with pytest.raises(OptionError, match="without activation"):
        ours(X)


def _timm_network() -> nn.Module:
    import timm

    torch.manual_seed(0)
    return used(timm.create_model("mobilenetv3_small_050", num_classes=10)).double()  # it amplifies rounding


@row(
    "timm, `freeze_batch_norm_2d`, `convert_sync_batchnorm`, `convert_splitbn_model`, `freeze`",
    "timm",
    "plain layers, fused models, and timm's layers with their activation",
    "for other layers with an activation, `revert`",
)
def timm_tools() -> None:
    from timm.layers import convert_splitbn_model, convert_sync_batchnorm
    from timm.layers.norm_act import freeze_batch_norm_2d, unfreeze_batch_norm_2d
    from timm.utils import freeze

    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = _timm_network()(x)

    def freeze_all(model: nn.Module) -> nn.Module:
        freeze(model)
        return model

    def there_and_back(model: nn.Module) -> nn.Module:
        return unfreeze_batch_norm_2d(freeze_batch_norm_2d(model))

    for tool in (freeze_batch_norm_2d, there_and_back, convert_sync_batchnorm, convert_splitbn_model, freeze_all):
        for ours in (bn.convert(_timm_network()), bn.fuse(_timm_network())):
            torch.testing.assert_close(tool(ours).eval()(x), expected)
        with pytest.raises(OptionError, match="without activation"):
            tool(with_options())


@row(
    "timm, `reparameterize_model`",
    "timm",
    "converted models; of a fused model it gives torch.nn's results too",
)
def timm_reparameterize() -> None:
    import timm
    from timm.utils import reparameterize_model

    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for name in ("repvgg_a0", "mobileone_s0"):
        torch.manual_seed(0)
        torchs = used(timm.create_model(name, num_classes=10)).double()
        expected = torchs(x)
        for ours in (bn.convert(copy.deepcopy(torchs)), bn.fuse(copy.deepcopy(torchs))):
            made = reparameterize_model(ours)
            assert sum(isinstance(module, nn.BatchNorm2d) for module in made.modules()) == sum(
                isinstance(module, nn.BatchNorm2d) for module in reparameterize_model(torchs).modules()
            )
            torch.testing.assert_close(made(x), expected)


@row(
    "opacus, `ModuleValidator`",
    "opacus",
    "`validate` refuses and `fix` replaces our layers as torch's, if opacus is imported before they are made",
    "`revert` before `fix` for layers with an activation",
)
def opacus_validator() -> None:
    from opacus.validators import ModuleValidator

    for ours in (bn.convert(plain()), bn.fuse(plain()), nn.Sequential(bn.BatchNorm(3), bn.BatchNorm1d(3))):
        assert len(ModuleValidator.validate(ours.train(), strict=False)) == 2
    fixed = ModuleValidator.fix(bn.convert(plain()))
    assert [type(module) for module in fixed][1] is nn.GroupNorm
    assert ModuleValidator.is_valid(fixed.train())
    assert not ModuleValidator.is_valid(with_options().train())
    with pytest.raises(OptionError, match="without activation"):
        ModuleValidator.fix(with_options())


@row(
    "pytorch-pfn-extras, `utils.checkpoint`",
    "pytorch-pfn-extras",
    "statistics as after one pass: its change of `momentum` leaves our layers out",
)
def pfn_extras_checkpoint() -> None:
    from pytorch_pfn_extras.utils.checkpoint import checkpoint

    x = X.clone().requires_grad_()
    ours, once = bn.convert(plain()).train(), plain().train()
    checkpoint(ours, x).sum().backward()
    once(x)
    for name, value in once.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
