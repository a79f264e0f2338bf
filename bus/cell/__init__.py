"""A cell: the typed face of the scripts, the only place that knows their KEYS and ARGV.

Theory of operation. The job hash is the truth; streams carry work and news. Each method is one script on one slot and
safe to repeat: a caller whose reply was lost calls again. Methods raise LinkDown or ServerError of `bus.link`.
Where a script may only write keys that the caller declares, the route of the job names them; a script that finds
another route answers `Moved` and has written nothing.

    jobs    submit look assign, the front door        nodes   own renew leases beats registrations
    work    flush finish requeue                      sweep   what time does
    follow  cancel attach, reading what is stored
"""

from bus.cell.jobs import JobCalls
from bus.cell.sweep import SweepCalls
from bus.cell.work import WorkCalls


class Cell(JobCalls, WorkCalls, SweepCalls):
    """All calls of one cell over one link. Its only state are the submits of this turn of the event loop."""
