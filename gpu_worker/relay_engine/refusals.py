"""Whose fault a refused request (400, 413, 422) is: the client's, or that of a node that refuses everything. Pure.

A node that is set up wrongly refuses each request at once, so it is always idle and would draw all jobs and end them.
Therefore a refusal counts as the node's, which sends the job elsewhere and leaves the node out for a while,

    as long as the node has answered nothing yet, and
    after ROW_MAX refusals without an answer between them.

But a job that comes back to a node which has refused it found nobody else: then the refusal is what its client hears.
"""

from bus.ids import JobId

ROW_MAX = 3
REMEMBERED_MAX = 1_000


class Refusals:
    """Of one node, since it was taken."""

    def __init__(self) -> None:
        self._answered = False
        self._row = 0
        self._sent_away: dict[JobId, None] = {}  # oldest first

    def answer(self) -> None:
        """The node has answered a request."""
        self._answered = True
        self._row = 0

    def refuse(self, job_id: JobId) -> bool:
        """The node has refused this job's request. Whether that is the node's fault, and the job goes elsewhere."""
        if job_id in self._sent_away:
            return False
        self._row += 1
        if self._answered and self._row <= ROW_MAX:
            return False
        self._sent_away[job_id] = None
        if len(self._sent_away) > REMEMBERED_MAX:
            del self._sent_away[next(iter(self._sent_away))]
        return True
