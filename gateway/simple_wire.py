"""The answer of POST /api/chat and /api/chat/gpu. Pure."""

from bus.ids import JobId, ModelName


def simple_answer(
    *,
    job_id: JobId,
    text: str,
    node: str,
    model: ModelName,
    reason: str,
    prompt_tokens: int,
    new_tokens: int,
    seconds: float,
) -> dict[str, object]:
    """seconds: from the request's arrival to the whole answer."""
    return {
        "success": True,
        "response": text,
        "node_id": node,
        "inference_time": round(seconds, 4),
        "model": model,
        "job_id": job_id,
        "finish_reason": reason,
        "prompt_tokens": prompt_tokens,
        "tokens_generated": new_tokens,
    }
