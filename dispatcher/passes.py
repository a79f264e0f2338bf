"""Passes: look at queue heads and nodes, plan, assign; back to back while that moves anything.

                wakes, timeouts, membership, due times
                              |  (which queues; many wakes make one pass)
    wait --> look --> plan (pure) --> assign --> jobs left and room for them? --> look ...
      ^                                             | no
      '---------------------------------------------'

One pass is two round trips for up to 64 jobs. Nothing is remembered about nodes between passes: the server's view is
the truth, and `assign` checks again. Remembered is only which queues had jobs left, to look there when room appears.
"""

import asyncio
import logging
from collections.abc import Collection, Sequence

import msgspec

from bus.cell import Cell
from bus.ids import JobId, ModelName, NodeId
from bus.keys import QueueName, queue_model
from bus.wire import Assigned, CellView, NodeView, NotAssigned, Pick, new_nonce
from dispatcher.plan import ASSIGN_MAX, Choice, plan
from dispatcher.rank import Draw, Node, is_open
from dispatcher.sharing import Share

SETTLED = {"gone", "not_queued"}  # the entry is no longer in the queue

log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class Passes:
    """The passes of one dispatcher over one cell. `wake` and `look_again` may be called at any time."""

    def __init__(self, cell: Cell, share: Share, draw: Draw) -> None:
        self.share = share
        self.assigned = 0  # jobs since the start
        self._cell = cell
        self._draw = draw
        self._turn = 0
        self._everything = True
        self._woken: set[QueueName] = set()
        self._left: set[QueueName] = set()  # queues whose jobs found no room in the last pass
        self._event = asyncio.Event()
        self._event.set()
        self._due: asyncio.TimerHandle | None = None

    def wake(self, queue: QueueName | None) -> None:
        """Work appeared in this queue; None: room appeared somewhere."""
        if queue is None:
            self._woken |= self._left
        elif self.share.owns(queue):
            self._woken.add(queue)
        else:
            self.look_again_in(self._cell.settings.take_over_ms / 1000)
            return
        self._event.set()

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
        """Wait until there may be something to do, at most BLOCK; then one pass."""
        if not self._event.is_set():
            try:
                async with asyncio.timeout(self._cell.settings.block_ms / 1000):
                    await self._event.wait()
            except TimeoutError:
                self._everything = True
        self._event.clear()
        await self.run_pass()

    async def run_pass(self) -> int:
        """One pass over what was woken. Returns how many jobs it assigned."""
        everything, self._everything = self._everything, False
        woken, self._woken = self._woken, set()
        if not everything and not woken:
            return 0
        try:
            return await self._look_and_assign(() if everything else tuple(woken))
        except BaseException:
            self.look_again()  # what this pass took up must not be forgotten
            raise

    async def _look_and_assign(self, queues: Sequence[QueueName]) -> int:
        self._turn += 1
        view = await self._cell.look(queues, ASSIGN_MAX)
        nodes = to_nodes(view)
        take_over_ms = self._cell.settings.take_over_ms
        mine = [one for one in view.queues if self.share.serves(one, view.now_ms, take_over_ms)]
        choices = plan(mine, nodes, view.now_ms, self._turn, self._draw)
        taken = await self._assign(choices)
        self._note(view, queues, {one.queue: one.length for one in mine}, nodes, taken)
        return sum(taken.assigned.values())

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
        return taken

    def _note(
        self,
        view: CellView,
        queues: Sequence[QueueName],
        lengths: dict[QueueName, int],
        nodes: dict[ModelName, list[Node]],
        taken: "_Taken",
    ) -> None:
        """Remember what is left, and arrange the next look: at once if something can still move, else when it may."""
        moved = sum(taken.settled.values())
        left = {queue for queue, length in lengths.items() if length > taken.settled.get(queue, 0)}
        self._left = left | (self._left - set(queues) if queues else set())
        if moved and left:
            roomy = {
                queue for queue in left if any(is_open(one, view.now_ms) for one in nodes.get(queue_model(queue), ()))
            }
            if roomy:
                self._woken |= roomy
                self._event.set()
        if view.due_ms:
            self.look_again_in(max(view.due_ms - view.now_ms, 1) / 1000)
        if any(one.heads and not self.share.owns(one.queue) for one in view.queues):
            self.look_again_in(self._cell.settings.take_over_ms / 1000)
        self.assigned += sum(taken.assigned.values())
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "pass",
                extra={
                    "queues": len(view.queues),
                    "waiting": sum(lengths.values()),
                    "assigned": moved,
                    "passed_over": taken.passed_over,
                },
            )

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


def to_nodes(view: CellView) -> dict[ModelName, list[Node]]:
    """The nodes that may get jobs, by model; one object for a node that serves several."""
    nodes: dict[ModelName, list[Node]] = {}
    lone = {job.job_id for one in view.queues for job in one.heads if job.alone}
    for one in view.nodes.values():
        if one.alive and one.leased and one.state == "up" and one.whole:
            node = to_node(one, lone)
            for model in one.models:
                nodes.setdefault(ModelName(model), []).append(node)
    return nodes


def to_node(view: NodeView, lone: Collection[JobId]) -> Node:
    """lone: waiting jobs that must run alone. A mark for another may be void: the node is offered, `assign` knows."""
    return Node(
        NodeId(view.node),
        view.capacity,
        view.running,
        view.promised_prompt,
        view.promised_new,
        view.prefill_rate,
        view.decode_rate,
        view.failure,
        view.breaker_n > 0,
        view.breaker_until_ms,
        view.breaker_probe != "",
        view.alone if view.alone in lone else "",
        view.resume,
    )


def to_pick(choice: Choice) -> Pick:
    job = choice.job
    nodes = tuple([score.node for score in choice.scores])
    return Pick(job.entry_id, job.job_id, job.fence, job.out, nodes, new_nonce(), _encode(choice.scores))
