"""Fold batch norm into the convolutions, write ONNX, and run it in onnxruntime; the answers are compared.

pip install "batchnorm[onnx,study]" onnxruntime
python examples/fold_onnx.py
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

import batchnorm as bn

torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1, bias=False), bn.BatchNorm2d(16, activation="relu")),
    *(nn.Conv2d(16, 32, 3, padding=1, bias=False), bn.BatchNorm2d(32, activation="silu")),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
)
pixels, _ = load_digits(return_X_y=True)
images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
bn.recalibrate(model, images.split(256))
model.eval()

folded = bn.fold(model, images[:2])  # a copy without batch norm, compared with the model on these inputs
print(folded.report)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.onnx"
    batch = torch.export.Dim("batch")
    program = torch.export.export(folded, (images[:2],), dynamic_shapes=({0: batch},))
    torch.onnx.export(program, f=str(path), verbose=False)
    session = onnxruntime.InferenceSession(path)
    (answers,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})

with torch.no_grad():
    expected = model(images)
difference = (torch.from_numpy(answers) - expected).abs().max()
same = (torch.from_numpy(answers).argmax(1) == expected.argmax(1)).float().mean()
print(f"onnxruntime on {len(images)} images: off by {difference:.0e} of {expected.abs().max():.2f} at the most")
print(f"the same class for {100 * same:.1f} % of them")
