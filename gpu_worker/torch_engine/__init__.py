"""The torch engine: tokens from weights, many sequences in one batch.

Nothing is imported here, so that the pure modules (sequence, kv_blocks, scheduler, detokenizer, stopping, draws) load
without torch. The worker imports `gpu_worker.torch_engine.bridge`.
"""
