# mypy: ignore-errors
"""llama.cpp: the server inside the `xllamacpp` wheel, called in process, so no HTTP on either side."""

from importlib.metadata import version

import xllamacpp
from driver import claim_stdout, in_threads, parse_options, serve


def main():
    pipe, options = claim_stdout(), parse_options()
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_parallel = options.requests
    params.n_ctx = options.requests * options.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.cache_prompt = False  # every prompt of a burst is new; looking for it would only cost
    params.cache_ram_mib = 0
    params.ui = False
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def answer(prompt, new, came):
        told = 0

        def heard(chunk):
            # One chunk may hold several tokens: parts of a character wait for each other.
            nonlocal told
            decoded = chunk.get("timings", {}).get("predicted_n", told)
            if decoded > told:
                came(decoded - told)
            told = decoded
            return False

        greedy = {"n_predict": new, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        server.handle_completions({"prompt": prompt, "stream": True, "timings_per_token": True, **greedy}, heard)

    serve(
        pipe,
        {"version": f"xllamacpp {version('xllamacpp')}", "storage": "q4_1, KV float16", "kv_itemsize": 2},
        burst=lambda prompts, new: in_threads(prompts, lambda prompt, came: answer(prompt, new, came)),
    )


main()
