"""Compile the kernels now, so that the first start need not: `python -m gpu_worker.torch_engine.kernels`."""

import sys

from gpu_worker.torch_engine.kernels.ready import compile_now

if __name__ == "__main__":
    compile_now(lambda line: print(line, file=sys.stderr))
