"""What an installed package has to do, beside torch and without anything of the tests'.

python tests/support/installed.py native      with the kernels of the wheel
python tests/support/installed.py reference   without them
"""

from __future__ import annotations

import sys

import torch

import batchnorm as bn


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(8, 3, 5, dtype=dtype)
        ours, theirs = (package.BatchNorm1d(3, dtype=dtype) for package in (bn, torch.nn))
        for layer in (ours.train(), theirs.train()):
            layer(x)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [ours(inputs[0]), theirs(inputs[1])]
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    serving = str(bn.kernels())
    print(f"torch {torch.__version__}", bn.__file__, serving, sep="\n")
    expected = f"float32    {sys.argv[1]}"
    if expected not in serving:
        raise SystemExit(f"'{expected}' is what should serve float32 here; see above for what does")


if __name__ == "__main__":
    main()
