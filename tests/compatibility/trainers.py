"""Libraries that train and load models."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import batchnorm as bn
from batchnorm.errors import OptionError
from compatibility.rows import row
from compatibility.together import in_two_processes
from compatibility.training import FORMS, NORMS, batches, converted, fused, inside, network, same_state, state
from support import tolerances
from support.comparison import close
from support.networks import used

Form = Callable[[Any], nn.Module]
HALF = tolerances.SEVERAL_ROUNDINGS[torch.bfloat16]


def as_it_is(model: nn.Module) -> nn.Module:
    """Torch's layers."""
    return model


def loader(rank: int = 0) -> DataLoader[Any]:
    """Four batches."""
    return DataLoader(torch.cat(batches(rank, 4)), batch_size=6)  # type: ignore[arg-type]  # samples in one tensor


# --- accelerate ------------------------------------------------------------------------------------------------------


@row(
    "accelerate, `init_empty_weights` and `load_checkpoint_and_dispatch`, `cpu_offload`, `disk_offload`",
    "accelerate",
    "as torch.nn; statistics stay float32 with `dtype=torch.bfloat16`",
)
def loaded_by_accelerate() -> None:
    from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
    from safetensors.torch import save_file

    x, expected = batches()[0], network().state_dict()
    y = network().eval()(x).detach()
    with TemporaryDirectory() as folder:
        weights = str(Path(folder) / "model.safetensors")
        save_file(expected, weights, metadata={"format": "pt"})
        for form in FORMS:
            for buffers in (True, False):
                for options in ({"device_map": {"": "cpu"}}, {"device_map": "auto"}):
                    with init_empty_weights(include_buffers=buffers):
                        model = form(network())
                    model = load_checkpoint_and_dispatch(model, weights, **options)
                    same_state(state(model), expected)
                    close(model.eval()(x).detach(), y)
            with init_empty_weights():
                model = form(network())
            model = load_checkpoint_and_dispatch(model, weights, device_map={"": "cpu"}, dtype=torch.bfloat16)
            assert {model.get_submodule(place).running_var.dtype for place in NORMS} == {torch.float32}
            close(model.eval()(x.bfloat16()).detach().float(), y, HALF)
            close(cpu_offload(form(network()).eval(), execution_device=torch.device("cpu"))(x).detach(), y)
            offloaded = disk_offload(form(network()).eval(), folder, execution_device=torch.device("cpu"))
            close(offloaded(x).detach(), y)


def accelerated(form: Form, rank: int, **options: Any) -> dict[str, Tensor]:
    """The state after an epoch."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, **options)
    net = form(network())
    parts = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.01), loader())
    model, optimizer, data = parts
    assert accelerator.num_processes == 2
    for x in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).float().pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
    return state(accelerator.unwrap_model(model))


@row(
    "accelerate, `Accelerator.prepare`, gradient accumulation, bfloat16", "accelerate", "as torch.nn, in two processes"
)
@in_two_processes
def trained_by_accelerate(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, though the group is there
    for options in ({}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}):
        expected = accelerated(as_it_is, rank, **options)
        for form in FORMS:
            found = accelerated(form, rank, **options)
            same_state(found, expected, HALF if "mixed_precision" in options else None)


# --- Lightning -------------------------------------------------------------------------------------------------------


def fitted(library: str, form: Form, epochs: int = 1, callbacks: Any = (), **options: Any) -> nn.Module:
    """The network after some epochs with a Trainer."""
    pl = importlib.import_module(library)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = form(network())

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.net(batch).float().pow(2).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, callbacks=list(callbacks), **quiet, **options)
    trainer.fit(module, loader())
    return module.net


def trained_by_lightning(library: str) -> None:
    for options in ({}, {"accumulate_grad_batches": 2}, {"sync_batchnorm": True}, {"precision": "bf16-mixed"}):
        expected = state(fitted(library, as_it_is, **options))
        for form in FORMS:
            found = fitted(library, form, **options)
            assert isinstance(found.get_submodule("1"), bn.BatchNorm2d)
            same_state(state(found), expected, HALF if "precision" in options else None)
    # In one process `sync_batchnorm` is nothing; with a strategy of several it makes torch's layers, which need a GPU.
    several: dict[str, Any] = {"sync_batchnorm": True, "strategy": "ddp"}
    for form in (as_it_is, converted, fused):
        with pytest.raises(ValueError, match="only work with GPU modules"):
            fitted(library, form, **several)
    with pytest.raises(OptionError, match=r"without activation.*batchnorm\.convert\(model, sync=True\)"):
        fitted(library, inside, **several)


def synchronized_by_lightning(library: str) -> None:
    plugin = importlib.import_module(f"{library}.plugins.layer_sync").TorchSyncBatchNorm()
    x, y = batches()[0], network().eval()(batches()[0]).detach()
    for form in (converted, fused):
        net = plugin.apply(form(network()))
        assert type(net[1]) is nn.SyncBatchNorm
        close(net.eval()(x).detach(), y)
        net = plugin.revert(net)
        close(net.eval()(x).detach(), y)
        same_state(state(net), network().state_dict())
    with pytest.raises(OptionError, match="without activation"):
        plugin.apply(inside(network()))


def averaged_by_lightning(library: str) -> None:
    callbacks = importlib.import_module(f"{library}.callbacks")

    def averaging() -> Any:
        return callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)

    expected = fitted(library, as_it_is, 4, [averaging()])
    plain = fitted(library, as_it_is, 4)
    assert not torch.equal(expected.get_parameter("1.weight"), plain.get_parameter("1.weight"))
    for form in FORMS:
        same_state(state(fitted(library, form, 4, [averaging()])), state(expected))


for _library, _package in (("lightning.pytorch", "lightning"), ("pytorch_lightning", "pytorch-lightning")):
    row(
        f"{_library}, `Trainer`",
        _package,
        "as torch.nn; `sync_batchnorm=True` with several processes makes torch's layers of plain ones and raises at a "
        "layer with an activation inside",
        "for shared statistics, `batchnorm.convert(model, sync=True)` instead",
    )(partial(trained_by_lightning, _library))
    row(
        f"{_library}, `TorchSyncBatchNorm`",
        _package,
        "plain and fused layers as torch.nn's, there and back; raises at a layer with an activation inside",
    )(partial(synchronized_by_lightning, _library))
    row(f"{_library}, `StochasticWeightAveraging`", _package, "weights and statistics as with torch.nn")(
        partial(averaged_by_lightning, _library)
    )


@row("lightning.pytorch, `EMAWeightAveraging`", "lightning", "weights and statistics as with torch.nn")
def averaged_exponentially() -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    expected = state(fitted("lightning.pytorch", as_it_is, 2, [EMAWeightAveraging(decay=0.5)]))
    for form in FORMS:
        same_state(state(fitted("lightning.pytorch", form, 2, [EMAWeightAveraging(decay=0.5)])), expected)


# --- transformers ----------------------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return used(ResNetForImageClassification(ResNetConfig(num_labels=2, **sizes)))


def mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    torch.manual_seed(0)
    return used(
        MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=2))
    )


def converted_and_fused(model: nn.Module) -> nn.Module:
    return bn.fuse(bn.convert(model))


def norms(model: nn.Module) -> list[bn.BatchNorm]:
    """Its layers, which are ours."""
    found = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert found
    assert all(type(layer) is bn.BatchNorm2d for layer in found)
    return found  # type: ignore[return-value]  # just asked


@row(
    "transformers, `save_pretrained` and `from_pretrained`",
    "transformers",
    "as torch.nn, converted or fused, both ways",
)
def pretrained() -> None:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for made in (resnet, mobilenet):
        expected, y = made().state_dict(), made()(x).logits.detach()
        for form in (bn.convert, converted_and_fused):
            with TemporaryDirectory() as folder:
                model = form(made())
                norms(model)
                close(model(x).logits.detach(), y)
                model.save_pretrained(folder)
                loaded = type(made()).from_pretrained(folder)
                same_state(loaded.state_dict(), expected)
                close(form(loaded)(x).logits.detach(), y)


@row("transformers, a model that converts itself in its `__init__`, on the meta device", "transformers", "as torch.nn")
def made_of_ours() -> None:
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for made in (resnet, mobilenet):
        y = made()(x).logits.detach()
        for form in (bn.convert, converted_and_fused):
            base: Any = type(made())

            def begin(self: Any, config: Any, base: Any = base, form: Any = form) -> None:
                base.__init__(self, config)
                form(self)

            ours = type("Ours", (base,), {"__init__": begin})
            with TemporaryDirectory() as folder:
                made().save_pretrained(folder)
                for options in ({}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}):
                    model = ours.from_pretrained(folder, **options)
                    half = "dtype" in options
                    found = model(x.to(model.dtype)).logits.detach().float()
                    close(found, y, HALF if half else None)
                    for layer in norms(model):
                        assert layer.running_var.dtype == torch.float32
                        assert not layer.num_batches_skipped.any()


@row("transformers, `Trainer`, gradient accumulation, bfloat16", "transformers", "as torch.nn")
def trained_by_transformers() -> None:
    from transformers import Trainer, TrainingArguments

    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": x, "labels": number % 2} for number, x in enumerate(pixels)]

    def trained(form: Form, **options: Any) -> dict[str, Tensor]:
        model = form(resnet())
        with TemporaryDirectory() as folder:
            own = {"max_steps": 3, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 1e-2}
            quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
            arguments = TrainingArguments(folder, use_cpu=True, **own, **quiet, **options)
            Trainer(model, arguments, train_dataset=rows).train()
        return state(model)

    for options in ({}, {"gradient_accumulation_steps": 2}, {"bf16": True}):
        expected = trained(as_it_is, **options)
        assert expected["resnet.embedder.embedder.normalization.num_batches_tracked"] > 0
        for form in (bn.convert, converted_and_fused):
            same_state(trained(form, **options), expected, HALF if "bf16" in options else None)


@row(
    "transformers, frozen layers of DETR and its kin, `replace_batch_norm`",
    "transformers",
    "as torch.nn's, whose eps it drops too; raises at layers with options that it would drop",
    "`batchnorm.revert(model)` of frozen ones",
)
def frozen_by_transformers() -> None:
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    for kind in ("detr", "conditional_detr", "deformable_detr", "rt_detr", "d_fine", "grounding_dino"):
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for eps in (1e-5, 0.1):
            expected, net = (used(nn.Sequential(cls(8, eps=eps))) for cls in (nn.BatchNorm2d, bn.BatchNorm2d))
            module.replace_batch_norm(expected)
            module.replace_batch_norm(net)
            assert type(net[0]) is type(expected[0])
            assert "FrozenBatchNorm2d" in type(net[0]).__name__
            close(net(x).detach(), expected(x).detach())
        for layer in (bn.BatchNorm2d(8, activation="relu"), bn.freeze(bn.BatchNorm2d(8))):
            with pytest.raises(OptionError, match="num_features"):
                module.replace_batch_norm(nn.Sequential(layer))
