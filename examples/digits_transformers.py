"""Train a small ResNet of transformers on handwritten digits with its Trainer; nothing is downloaded.

`bn.convert` replaces its torch.nn layers; a callback sets the population statistics after the last step.

pip install "batchnorm[integrations,study]"
python examples/digits_transformers.py
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import batchnorm as bn
from batchnorm.integrations.transformers import Recalibrate


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Per cent right."""
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    return {"accuracy": 100 * (logits.argmax(1) == labels).float().mean().item()}


pixels, labels = load_digits(return_X_y=True)
images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
train, test = rows[:1437], rows[1437:]

torch.manual_seed(0)
config = ResNetConfig(num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
config.num_labels = 10
model = ResNetForImageClassification(config)
bn.convert(model)
print(f"layers converted: {sum(isinstance(module, bn.BatchNorm2d) for module in model.modules())}")

recalibrate = Recalibrate(when="end")
with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=360,
        learning_rate=5e-3,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model, options, train_dataset=train, eval_dataset=test, compute_metrics=accuracy, callbacks=[recalibrate]
    )
    trainer.train()
    print(f"test accuracy: {trainer.evaluate()['eval_accuracy']:.1f} %")
print(recalibrate.result)  # how far the running averages were from the statistics that were set
