"""The log probabilities of one answer, token by token, each with its place in the text. No torch."""

import dataclasses

from bus.codec.logprobs import Candidate, TokenLogprobs, encode_record, encode_restart
from gpu_worker.torch_engine.text_model import TextModel


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Log probabilities of a token, and of the likeliest ones as (token, log probability), in falling order."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class LogprobTrail:
    """Records of tokens that were fed to the answer's text stream and not handed out yet.

    offset: bytes of the text that the stream has let out before the first token. restarts: that text was another
    engine's, and of its tokens nothing is known here.
    """

    def __init__(self, model: TextModel, offset: int, *, restarts: bool) -> None:
        self._model = model
        self._offset = offset
        self._records = bytearray(encode_restart(offset) if restarts else b"")

    def note(self, token: int, scores: TokenScores, held_bytes: int) -> None:
        """A token that is about to be fed. held_bytes: of the tokens before it, what the stream still holds back."""
        top = tuple(self._named(*one) for one in scores.top)
        at = self._offset + held_bytes
        self._records += encode_record(TokenLogprobs(at, self._named(token, scores.logprob), top))

    def let_out(self, text: str) -> None:
        self._offset += len(text.encode())

    def take(self) -> bytes:
        taken = bytes(self._records)
        self._records.clear()
        return taken

    def _named(self, token: int, logprob: float) -> Candidate:
        name = self._model.token_bytes[token] if token < len(self._model.token_bytes) else b""
        if name:
            return Candidate(name, logprob)
        hidden = self._model.tokenizer.id_to_token(token)  # None: padding of the head, no token at all
        return Candidate((hidden or "").encode(), logprob, special=True)
