"""Train on handwritten digits in plain torch; set the population statistics before the model is judged.

pip install "batchnorm[study]"
python examples/digits_torch.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import batchnorm as bn

STEPS, BATCH_SIZE = 120, 32


class Block(nn.Module):
    """A residual block. The second layer adds the shortcut and applies ReLU itself: relu(norm(x) + residual)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = bn.BatchNorm2d(channels, activation="relu")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = bn.BatchNorm2d(channels, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to the same shape."""
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)
        return y


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per cent right, in inference mode."""
    with torch.no_grad():
        right: Tensor = model.eval()(x).argmax(1) == y
    return 100 * right.float().mean().item()


torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)
x_train, y_train, x_test, y_test = x[:1437], y[:1437], x[1437:], y[1437:]

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False),
    bn.BatchNorm2d(16, activation="relu"),
    *(Block(16), Block(16), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(STEPS):
    chosen = torch.randint(len(x_train), (BATCH_SIZE,))
    loss = nn.functional.cross_entropy(model.train()(x_train[chosen]), y_train[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(f"test accuracy by running averages: {accuracy(model, x_test, y_test):.1f} %")
bn.recalibrate(model, x_train.split(128))  # one pass over the data: the statistics that inference will see
print(f"test accuracy after bn.recalibrate: {accuracy(model, x_test, y_test):.1f} %")
