"""How long running answers wait for their next token with no prompt beside them: the unit of what they are promised.

Pure. While a prompt comes in, each step is a sum of theirs and the prompt's part, and which is which can only be
guessed: a guess that is too long makes the next chunk longer, and looks right afterwards. So now and then a step leaves
the prompt out, and what it took is what counts; at once when the machine's speed has changed.
"""

import statistics
from collections import deque

from gpu_worker.torch_engine.step_time import Load, StepTime

KEPT = 3  # steps without a prompt that are remembered: one late one among them does not matter
EVERY = 16  # steps with prompts after which one goes without: it costs them two hundredths of their speed


class OwnInterval:
    def __init__(self, step_time: StepTime) -> None:
        self._step_time = step_time
        self._alone: deque[tuple[Load, float]] = deque(maxlen=KEPT)
        self._mixed = 0  # steps since
        self._changes = 0  # of speed, until then

    @property
    def outdated(self) -> bool:
        """Whether the next step should be without prompts, if there are answers that were promised something."""
        return self._mixed >= EVERY

    def observe(self, load: Load, seconds: float) -> bool:
        """A step with answers, which `step_time` has seen. Whether the machine's speed has changed since the last."""
        changed, self._changes = self._step_time.changes > self._changes, self._step_time.changes
        if not load.chunks:
            self._mixed = 0
            self._alone.append((load, seconds))
        elif changed:
            self._mixed = EVERY
            self._alone.clear()
        else:
            self._mixed += 1
        return changed

    def seconds(self, answers: Load) -> float:
        """For these answers, which need not be those that were measured."""
        expected_s = self._step_time.expected_s
        measured = [seconds / expected_s(load) for load, seconds in self._alone]
        return expected_s(answers) * (statistics.median(measured) if measured else 1.0)
