# mypy: ignore-errors
"""transformers' continuous batching on a GPU: of a folder's weights or, where it holds none, of random ones."""

from pathlib import Path

import torch
import transformers
from driver import claim_stdout, parse_options, serve
from transformers import AutoConfig, AutoModelForCausalLM
from transformers_generate import continuous


def load(folder):
    if any(Path(folder).glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)


def main():
    pipe, options = claim_stdout(), parse_options()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} of this venv sees no GPU")
    torch.set_grad_enabled(False)
    model = load(options.model).eval()
    model.generation_config.eos_token_id = None
    ready = {"version": f"transformers {transformers.__version__}, torch {torch.__version__}", "storage": "bfloat16"}
    serve(pipe, ready, burst=continuous(model, options))


if __name__ == "__main__":
    main()
