"""Model directories from the Hugging Face hub. Imported only when a hub id is asked for: most workers never need it."""

from pathlib import Path

import huggingface_hub

from gpu_worker.engine import EngineStartError

WANTED = ["*.json", "*.safetensors", "*.jinja"]
UNWANTED = ["consolidated*", "original/*", "onnx/*", "params.json"]  # the same weights in other forms


def fetch_from_hub(name: str, cache: Path) -> Path:
    """The local directory of a model's snapshot; the client resumes and checks it. Raises EngineStartError."""
    try:
        return Path(
            huggingface_hub.snapshot_download(name, cache_dir=cache, allow_patterns=WANTED, ignore_patterns=UNWANTED)
        )
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineStartError(f"{name} could not be fetched from the hub: {first_line}") from error
