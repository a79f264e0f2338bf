"""Passes: look at queue heads and nodes, plan, assign; back to back while that moves anything.

                wakes, timeouts, membership, due times
                              |  (which queues; many wakes make one pass)
    wait --> look --> plan (pure) --> assign --> jobs left and room for them? --> look ...
      |                 ^                           | no
      | new jobs, nodes |                           |
      '--known (Board)--' <-------------------------'

One pass is two round trips for up to 64 jobs, or one, when wakes brought the jobs and the nodes were looked at a moment
ago. The server's view is the truth and `assign` checks every choice, so what is remembered here may be wrong.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence

from msgspec.structs import replace

from bus.cell import Cell
from bus.codec.wire import Assigned, CellView, Ended, NotAssigned, NotYours, QueuedJob, QueueView, Requeued
from bus.ids import JobId, ModelName
from bus.keys import PRIORITIES, QueueName, queue_model, queue_name
from dispatcher.board import FRESH_MS, Board
from dispatcher.hopes import Hopes
from dispatcher.paging import Pages
from dispatcher.plan import ASSIGN_MAX, Choice, plan, unserved
from dispatcher.rank import Draw, Node, is_open
from dispatcher.sharing import Share
from dispatcher.views import to_nodes, to_pick

SETTLED = {"gone", "not_queued"}  # the entry is no longer in the queue
ASKED_MAX = 10_000

log = logging.getLogger(__name__)


class Passes:
    """The passes of one dispatcher over one cell. `wake` and `look_again` may be called at any time."""

    def __init__(self, cell: Cell, share: Share, draw: Draw, fresh_ms: float = FRESH_MS) -> None:
        self.share = share
        self.assigned = 0  # jobs since the start
        self.looks = 0
        self._cell = cell
        self._draw = draw
        self._turn = 0
        self._board = Board(fresh_ms)
        self._pages = Pages(ASSIGN_MAX)
        self._from_the_front = False  # room appeared: the oldest jobs may have it
        self._everything = True
        self._woken: set[QueueName] = set()  # to be looked at
        self._fresh: dict[QueueName, list[QueuedJob]] = {}  # brought by wakes
        self._left: set[QueueName] = set()  # had jobs left after the last look
        self._stuck: set[QueueName] = set()  # of these, those without room: more jobs change nothing
        self._room = False  # room appeared during the pass: its look may not have seen that
        self._hopes = Hopes(ASSIGN_MAX)
        self._asked: dict[JobId, tuple[str, ...]] = {}  # needs that `assign` told: the entry is an older release's
        self._event = asyncio.Event()
        self._event.set()
        self._due: asyncio.TimerHandle | None = None

    def wake(self, queue: QueueName, job: QueuedJob | None) -> None:
        """Work appeared in this queue; `job` is its entry, if the wake brought it."""
        if not self.share.owns(queue):
            self.look_again_in(self._cell.settings.take_over_ms / 1000)
        elif queue not in self._stuck:
            if job is None or self._waits(queue_model(queue)):
                self._woken.add(queue)
            else:
                self._fresh.setdefault(queue, []).append(job)
            self._event.set()

    def wake_room(self) -> None:
        """Room appeared somewhere."""
        self._room = True
        self._from_the_front = True
        if self._left:
            self._woken |= self._left
            self._event.set()

    def _waits(self, model: ModelName) -> bool:
        """Whether jobs of the model that came earlier may be waiting."""
        queues = {queue_name(model, priority) for priority in PRIORITIES}
        return not queues.isdisjoint(self._left) or not queues.isdisjoint(self._woken)

    def start_over(self) -> None:
        """Another connection, perhaps another server: what was remembered may not be true of it."""
        self._board = Board(self._board.fresh_ms)
        self._stuck.clear()
        self.look_again()

    def look_again(self) -> None:
        """Look at every queue as soon as the pass in hand is done."""
        self._everything = True
        self._event.set()

    def look_again_in(self, seconds: float) -> None:
        """Look at every queue then, or earlier if that is arranged already."""
        loop = asyncio.get_running_loop()
        if self._due is None or self._due.when() > loop.time() + seconds:
            self._cancel_due()
            self._due = loop.call_later(seconds, self._on_due)

    def close(self) -> None:
        self._cancel_due()
        self._event.set()

    async def step(self) -> None:
        """Wait until there may be something to do, then one pass.

        The wait ends at each timeout of the wake stream's reader and at each renewal of the lease: both look again.
        """
        await self._event.wait()
        self._event.clear()
        await self.run_pass()

    async def run_pass(self) -> None:
        """One pass over what was woken."""
        everything, self._everything = self._everything, False
        woken, self._woken = self._woken, set()
        fresh, self._fresh = self._news(), {}
        if not (everything or woken or fresh):
            return
        if everything or self._from_the_front:
            self._from_the_front = False
            self._pages.restart()
        self._turn += 1
        try:
            nodes = None if everything or woken else self._board.nodes_for(map(queue_model, fresh), self._clock_ms())
            if nodes is not None:
                await self._assign_fresh(fresh, nodes)
            else:
                await self._look_and_assign(() if everything else tuple({*woken, *fresh}))
        except BaseException:
            self.look_again()  # what this pass took up must not be forgotten
            raise

    def _news(self) -> dict[QueueName, list[QueuedJob]]:
        """The jobs that wakes brought, but for those that a look has shown meanwhile."""
        news: dict[QueueName, list[QueuedJob]] = {}
        for queue, jobs in self._fresh.items():
            unseen = [job for job in jobs if self._board.is_news(queue, job)]
            if unseen and queue not in self._stuck:
                news[queue] = unseen
        return news

    async def _assign_fresh(
        self, fresh: Mapping[QueueName, Sequence[QueuedJob]], nodes: Mapping[ModelName, Sequence[Node]]
    ) -> None:
        """Without a look. What does not find a node this way is looked for."""
        views = [QueueView(queue, len(jobs), tuple(jobs)) for queue, jobs in fresh.items()]
        taken = await self._assign(plan(views, nodes, self._board.now_ms(self._clock_ms()), self._turn, self._draw))
        for view in views:
            if taken.settled.get(view.queue, 0) < view.length:
                self._woken.add(view.queue)
                self._event.set()
        self._log(taken, "fresh", sum(view.length for view in views))

    async def _look_and_assign(self, queues: Sequence[QueueName]) -> None:
        """Page by page while nothing moves and a node has room. All in one pass: on a busy fleet room appears all the
        time, and each time the next pass begins at the front again."""
        self._hopes.forget(self._clock_ms() / 1000)
        more = await self._take_page(queues)
        while more:
            more = await self._take_page(tuple(more))

    async def _take_page(self, queues: Sequence[QueueName]) -> set[QueueName]:
        """Answers the queues whose next page is worth a look.

        What wakes say from here on may be later than what the look shows, so it leads to another pass.
        """
        self.looks += 1
        self._room = False
        self._stuck -= set(queues or self._stuck)
        after = self._pages.after
        view = await self._cell.look(queues, ASSIGN_MAX, after)
        nodes = to_nodes(view)
        take_over_ms = self._cell.settings.take_over_ms
        mine = [one for one in view.queues if one.queue in after or self.share.serves(one, view.now_ms, take_over_ms)]
        if self._asked:
            mine = [self._told(one) for one in mine]
        taken = await self._assign(plan(mine, nodes, view.now_ms, self._turn, self._draw))
        await self._end_unserved(unserved(mine, view, nodes), taken)
        self._board.remember(view, nodes, self._clock_ms())
        more = self._note(view, queues, mine, nodes, taken)
        self._log(taken, "looked", sum(one.length for one in mine))
        return more

    @staticmethod
    def _clock_ms() -> float:
        return asyncio.get_running_loop().time() * 1000

    async def _assign(self, choices: Sequence[Choice]) -> "_Taken":
        """One call for each queue, all in one write."""
        taken = _Taken()
        by_queue: dict[QueueName, list[Choice]] = {}
        for choice in choices:
            by_queue.setdefault(choice.queue, []).append(choice)
        calls = [self._cell.assign(queue, [to_pick(one) for one in chosen]) for queue, chosen in by_queue.items()]
        answers = [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)
        for queue, outcomes in zip(by_queue, answers, strict=True):
            taken.count(queue, outcomes)
            self._learn(by_queue[queue], outcomes)
        return taken

    def _learn(self, choices: Sequence[Choice], outcomes: Sequence[Assigned | NotAssigned]) -> None:
        """Nodes that cannot do it were named, because the entry does not say what the job asks for: name others."""
        for choice, outcome in zip(choices, outcomes, strict=True):
            if isinstance(outcome, NotAssigned) and outcome.needs and not choice.job.needs:
                if len(self._asked) >= ASKED_MAX:
                    self._asked.clear()
                self._asked[outcome.job_id] = outcome.needs
                self._woken.add(choice.queue)
                self._event.set()

    def _told(self, view: QueueView) -> QueueView:
        heads = [
            replace(job, needs=self._asked[job.job_id]) if job.job_id in self._asked else job for job in view.heads
        ]
        return replace(view, heads=tuple(heads))

    async def _end_unserved(self, jobs: Sequence[tuple[QueueName, QueuedJob]], taken: "_Taken") -> None:
        """No node can do what these ask for. The script looks again: a node may have come meanwhile, or have left to
        come back."""
        jobs = [(queue, job) for queue, job in jobs if job not in self._hopes]
        ends = await asyncio.gather(*(self._cell.end_unserved(job.job_id, job.fence) for _, job in jobs))
        for (queue, job), end in zip(jobs, ends, strict=True):
            about = {"job": job.job_id, "needs": job.needs, "outgrown": job.outgrown}
            match end:
                case Requeued():
                    taken.count_settled(queue)
                    log.info("no larger context is left for the job: back to the others", extra=about)
                case Ended(earlier=False):
                    taken.count_settled(queue)
                    log.info("no node can do what the job asks for", extra=about)
                case NotYours(state="queued"):
                    self._hopes.add(job, self._clock_ms() / 1000)

    def _note(
        self,
        view: CellView,
        queues: Sequence[QueueName],
        mine: Sequence[QueueView],
        nodes: dict[ModelName, list[Node]],
        taken: "_Taken",
    ) -> set[QueueName]:
        """Remember what is left, and arrange the next look: at once if something can still move, else when it may.
        Answers the queues of which the next page is worth a look."""
        moved = sum(taken.settled.values())
        left = {one.queue for one in mine if one.length > taken.settled.get(one.queue, 0)}
        roomy = {queue for queue in left if any(is_open(one, view.now_ms) for one in nodes.get(queue_model(queue), ()))}
        looked = set(queues) or (self._left | self._stuck)
        # Another's queue is not ours to watch: if its jobs still wait, the next look at everything finds them.
        own = {queue for queue in left if self.share.owns(queue)}
        self._left = own | (self._left - looked)
        self._stuck = (own - roomy) | (self._stuck - looked)
        # A pick that was gone has counted against its node in vain.
        void = {queue for queue in left if taken.settled.get(queue, 0) > taken.assigned.get(queue, 0)}
        again = (roomy if moved else set()) | void | (own if self._room else set())
        if again:
            self._woken |= again
            self._event.set()
        if view.due_ms > view.now_ms:
            self.look_again_in((view.due_ms - view.now_ms) / 1000)
        if any(one.heads and not self.share.owns(one.queue) for one in view.queues):
            self.look_again_in(self._cell.settings.take_over_ms / 1000)
        return self._next_pages(mine, roomy, taken)

    def _next_pages(self, mine: Sequence[QueueView], roomy: Collection[QueueName], taken: "_Taken") -> set[QueueName]:
        """The queues of which nothing could move, though a node has room: the jobs behind may be of another mind."""
        turned = {one.queue: self._pages.turn(one, taken.settled.get(one.queue, 0), one.queue in roomy) for one in mine}
        return {queue for queue, more in turned.items() if more}

    def _log(self, taken: "_Taken", how: str, waiting: int) -> None:
        """One line a pass."""
        assigned = sum(taken.assigned.values())
        self.assigned += assigned
        if log.isEnabledFor(logging.DEBUG):
            extra = {"how": how, "waiting": waiting, "assigned": assigned, "passed_over": taken.passed_over}
            log.debug("pass", extra=extra)

    def _on_due(self) -> None:
        self._due = None
        self.look_again()

    def _cancel_due(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


class _Taken:
    """What became of a pass' picks."""

    def __init__(self) -> None:
        self.assigned: dict[QueueName, int] = {}
        self.settled: dict[QueueName, int] = {}  # assigned, or gone from the queue for another reason
        self.passed_over: list[str] = []  # why, for each pick that stays in its queue

    def count_settled(self, queue: QueueName) -> None:
        self.settled[queue] = self.settled.get(queue, 0) + 1

    def count(self, queue: QueueName, outcomes: Sequence[Assigned | NotAssigned]) -> None:
        assigned = sum(1 for one in outcomes if isinstance(one, Assigned))
        self.assigned[queue] = assigned
        self.settled[queue] = assigned
        for one in outcomes:
            if isinstance(one, NotAssigned):
                if one.why in SETTLED:
                    self.settled[queue] += 1
                else:
                    self.passed_over.append(one.why)
