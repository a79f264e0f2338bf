"""One generation: its tokens, how far they are computed, and the blocks that hold them.

    tokens      [ prompt ........ | forced answer .. | new answer .. ]
                0                 prompt_len          (forced_len)     len(tokens)
    computed    [ cached_len ......... )              keys and values of these positions lie in `blocks`

A sequence is *pending* in the tokens behind `cached_len`: one while it decodes, many while its prompt (or, after a
preemption, all of it) is prefilled. The last position's logits give the next token, so a step that computes the
last pending token samples; a step that computes an earlier chunk does not.

A step that was launched counts as computed. What it draws is *unread* until the host has looked: one token more than
`tokens` holds, pending like the others, its value known to the device alone.

    waiting --admit--> running --finish--> finished
       ^------preempt-----'        (blocks freed, cached_len = 0, tokens kept: recomputed later, never lost)
"""

import dataclasses
import enum

from gpu_worker.torch_engine.speculation import Guesser
from gpu_worker.torch_engine.token_history import TokenHistory


class State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(frozen=True)
class SamplingChoice:
    """Sampling with every default resolved. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch their filter
    off, a repetition penalty of 1 and other penalties of 0 change nothing."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit), each token once
    logprobs: int | None = None  # None: not asked for; else of the token and of so many likeliest ones

    @property
    def penalised(self) -> bool:
        """Whether the next token depends on which tokens came before, beyond what the model makes of them."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def adjusted(self) -> bool:
        return self.penalised or bool(self.logit_bias)


@dataclasses.dataclass
class Sequence:
    id: str
    tokens: list[int]  # prompt, forced prefix and answer; grows by one with each sampled token
    prompt_len: int
    forced_len: int  # answer tokens that an earlier attempt produced
    total_max: int  # never more tokens than this: context, max_tokens and pool, whichever is least
    sampling: SamplingChoice
    ignore_eos: bool = False
    outgrows: bool = False  # at total_max it is the context that ends it, and not its max_tokens
    state: State = State.WAITING
    cached_len: int = 0  # positions whose keys and values are computed or will be by launched steps; 0 when preempted
    unread: int = 0  # tokens that launched steps draw and the host does not know yet
    in_flight: int = 0  # pieces of its work that are launched and not read: they may still write to its blocks
    blocks: list[int] = dataclasses.field(default_factory=list)  # owned through BlockPool, in order of position
    hashes: list[bytes] = dataclasses.field(default_factory=list)  # chain hash of each full block, as far as computed
    arrived_s: float = 0.0
    first_token_s: float = 0.0
    preemptions: int = 0
    reused_tokens: int = 0  # prompt tokens found in the prefix cache at the last admission
    guesser: Guesser | None = None  # None: its steps carry no drafts
    counted: TokenHistory | None = None  # what `history` made, once it was asked for

    @property
    def pending(self) -> int:
        return len(self.tokens) + self.unread - self.cached_len

    @property
    def complete(self) -> bool:
        """All tokens that it may have are there or unread: no further step is of use."""
        return len(self.tokens) + self.unread >= self.total_max

    def history(self) -> TokenHistory | None:
        """Of the tokens as they are now. None: its sampling looks at none."""
        choice = self.sampling
        if not choice.adjusted:
            return None
        if self.counted is None:
            prompt = self.tokens[: self.prompt_len] if choice.repetition_penalty != 1.0 else ()
            self.counted = TokenHistory(prompt, choice.logit_bias)
        if choice.penalised:
            self.counted.follow(self.tokens, self.prompt_len)
        return self.counted

    @property
    def answer_len(self) -> int:
        """Tokens of the whole answer, forced prefix included: the sampler's position."""
        return len(self.tokens) - self.prompt_len
