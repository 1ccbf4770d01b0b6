"""`python -m batchnorm`: the command line where only the interpreter is at hand, as under `torchrun -m batchnorm`."""

from batchnorm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
