# mypy: ignore-errors
"""transformers: static `generate` (`--mode static`), or its continuous batching (`--mode continuous`)."""

import time
from inspect import signature

import torch
import transformers
from driver import claim_stdout, parse_options, serve
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE = 256
PAGE_SIZE = "page_size" if "page_size" in signature(ContinuousBatchingConfig).parameters else "block_size"  # up to 5.17
BATCH_TOKENS_MAX = 1024


class TokenTimes:
    """A streamer: `generate` calls `put` with the prompts, and then with the next token of every row."""

    def __init__(self):
        self.at_s = []
        self.prompts_seen = False

    def put(self, _tokens):
        if self.prompts_seen:
            self.at_s.append(time.perf_counter())
        self.prompts_seen = True

    def end(self):
        pass


def static(model, _options):
    def burst(prompts, new):
        times = TokenTimes()
        began_s = time.perf_counter()
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, generation_config=greedy(new), streamer=times)
        return {"arrivals": [[(at_s - began_s, 1) for at_s in times.at_s] for _ in prompts]}

    return burst


def continuous(model, options):
    manager = model.init_continuous_batching(
        generation_config=greedy(options.context),
        continuous_batching_config=ContinuousBatchingConfig(
            **{PAGE_SIZE: PAGE},
            num_blocks=(options.requests + 1) * -(-options.context // PAGE),
            max_batch_tokens=BATCH_TOKENS_MAX,
            max_requests_per_batch=options.requests,
            allow_block_sharing=False,  # every prompt of a burst is new
        ),
    )
    manager.start()

    def burst(prompts, new):
        began_s = time.perf_counter()
        ask = {"max_new_tokens": new, "eos_token_id": -1, "record_timestamps": True}
        names = [manager.add_request(prompt, **ask) for prompt in prompts]
        ended = {}
        while len(ended) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                ended[result.request_id] = result
            elif not manager.is_running():
                raise SystemExit("continuous batching ended by itself")
        return {"arrivals": [[(at_s - began_s, 1) for at_s in ended[name].timestamps] for name in names]}

    return burst


def greedy(new):
    return GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)


def main():
    pipe, options = claim_stdout(), parse_options()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    ready = {
        "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "storage": options.dtype,
        "kv_itemsize": dtype.itemsize,
    }
    serve(pipe, ready, burst={"static": static, "continuous": continuous}[options.mode](model, options))


if __name__ == "__main__":
    main()
