"""Jobs that wait for a node that is not seen, and when the server is asked about each of them again.

No living node can do what they ask for; one that is away may, so that the server lets them wait. They may be many, and
nothing changes for them at each look. An answer that has begun waits for seconds only, and is asked about each second.
The others may wait until their deadline: all of them together cost about `a_second` calls a second.
"""

from bus.codec.wire import QueuedJob
from bus.ids import Fence, JobId

AGAIN_S = 1.0
HOPES_MAX = 100_000


class Hopes:
    def __init__(self, a_second: int) -> None:
        self._a_second = a_second
        self._until_s: dict[tuple[JobId, Fence], float] = {}  # another attempt may have changed what it asks for

    def __contains__(self, job: QueuedJob) -> bool:
        return (job.job_id, job.fence) in self._until_s

    def add(self, job: QueuedJob, now_s: float) -> None:
        """The server has just said that it may wait."""
        if len(self._until_s) >= HOPES_MAX:
            self._until_s.clear()
        pages = 0 if job.begun else len(self._until_s) // self._a_second
        self._until_s[job.job_id, job.fence] = now_s + AGAIN_S * (1 + pages)

    def forget(self, now_s: float) -> None:
        """Those that are to be asked about again."""
        if self._until_s:
            self._until_s = {job: until_s for job, until_s in self._until_s.items() if until_s > now_s}
