"""Where the benchmarks find the model that they measure."""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = ROOT / "var/models/smollm2-135m-instruct"


def model_directory(text: str) -> Path:
    """A type of argparse: a directory with a model in it, or what to do about that."""
    folder = Path(text)
    if not (folder / "config.json").is_file():
        message = f"no model in {folder}: `make model` fetches the default one, --model names another directory"
        raise argparse.ArgumentTypeError(message)
    return folder
