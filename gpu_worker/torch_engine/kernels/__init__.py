"""The decoder's arithmetic on a CPU, compiled by Numba: weights stay as small as they were stored, sums are float32.

    vectors     eight numbers in a register, and what can be done with them
    functions   exponential, SiLU
    weights     how a weight matrix lies in memory
    products    y = x W^T
    rows        norms, rotary positions, keys and values into their blocks
    attention   queries over paged keys and values
    program     a step as a list of operations that several threads work through together
    operations  which operations a layer is
    decoder     a model as such a program
    packing     weights of a file into that form

Compiling takes about half a minute, once: `python -m gpu_worker.torch_engine.kernels` does it ahead of the first start.
The code is kept in a directory named by a digest of this room, since Numba itself notices changes of one file only.
ready.py removes those of other versions when nobody used them for a month.
"""

import atexit
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numba

COMPILED = ("vectors", "functions", "weights", "products", "rows", "attention", "program")
LOCK = "lock"  # of the directory: held while somebody compiles, touched by each start, so that old ones are known


def cache_directory() -> Path:
    """Where compiled kernels of exactly this code are kept: in the user's cache, or a directory of this process."""
    digest = hashlib.sha256(numba.__version__.encode())
    for name in COMPILED:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    try:
        # What the user chose with NUMBA_CACHE_DIR comes first; the digest is needed there too.
        base = Path(numba.config.CACHE_DIR or Path.home() / ".cache" / "millrace")
        directory = base / f"kernels-{digest.hexdigest()[:16]}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / LOCK).touch()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return _directory_of_this_process()
    return directory if os.access(directory, os.W_OK) else _directory_of_this_process()


def _directory_of_this_process() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="millrace-kernels-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


numba.config.CACHE_DIR = str(cache_directory())
