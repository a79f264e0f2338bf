"""The scripts in random interleavings on a real server, with zombies, deaths, take-overs and passing time.

Two nodes, two gateways. Workers remember every attempt they ever read and act on any of them, however stale. After
each step `check_invariants` reads the server. Every attempt at a job produces the same text, so a mix-up shows.
"""

import asyncio
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from bus.entries import Assignment
from bus.events import NodeBye
from bus.ids import GatewayId, JobId, NodeId
from bus.link import Link, ServerAddress
from bus.settings import Settings
from bus.wire import (
    Finished,
    FinishPiece,
    FinishReply,
    FlushPiece,
    FlushReply,
    Gap,
    HeldBy,
    Moved,
    Owned,
    Pick,
    Stored,
    Submission,
    Superseded,
    new_nonce,
    pack_tokens,
)
from tests.harness.servers import ValkeyServer
from tests.protocol.invariants import check_invariants
from tests.protocol.world import World, chat, make_world

NODES = ("a", "b")
CAPACITY = {"a": 2, "b": 1}
WHYS = ("crash", "node_error", "drain", "unread", "relay_lost")
SETTINGS = Settings(queue_max=6)

nodes = st.sampled_from(NODES)
gateways = st.sampled_from(("g1", "g2"))
any_one = st.integers(min_value=0, max_value=10**6)


def answer_of(job_id: JobId) -> bytes:
    """The whole answer to a job: 12 bytes, one token each."""
    return random.Random(job_id).randbytes(6).hex().encode()


class CellMachine(RuleBasedStateMachine):
    server: ValkeyServer
    cell_index = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.jobs: list[JobId] = []
        self.submissions: list[Submission] = []
        self.attempts: list[Assignment] = []  # every one ever read, zombies included
        self.routes: dict[str, Any] = {}
        self.ok_finishes: dict[JobId, set[str]] = {}
        self.run(self.set_up())

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    async def set_up(self) -> None:
        self.server.call("FLUSHALL")
        self.link = await Link.connect(ServerAddress.parse(self.server.url), name="machine")
        self.world: World = await make_world(self.link, self.cell_index, SETTINGS)
        await self.world.cell.lease("g2")
        for name in NODES:
            await self.world.node(name, capacity=CAPACITY[name], resume="d" if name == "a" else "")
        await self.world.end_grace()

    def teardown(self) -> None:
        self.run(self.link.close())
        self.loop.close()

    # --- callers ---

    @rule(stream=st.booleans(), policy=st.sampled_from(("cancel", "keep")), gateway=gateways, quota=st.booleans())
    def submit(self, stream: bool, policy: Any, gateway: str, quota: bool) -> None:
        number = len(self.submissions)
        submission = self.world.submission(
            f"j{number}",
            job=chat(stream=stream),
            policy=policy,
            gateway=GatewayId(gateway),
            key_id="k" if quota else "",
            quota_max=3 if quota else 0,
        )
        self.submissions.append(submission)
        self.jobs.append(submission.job_id)
        self.run(self.world.cell.submit(submission))

    @precondition(lambda self: self.submissions)
    @rule(which=any_one)
    def submit_again(self, which: int) -> None:
        self.run(self.world.cell.submit(self.submissions[which % len(self.submissions)]))

    @precondition(lambda self: self.jobs)
    @rule(which=any_one, gateway=st.sampled_from((None, "g1", "g2")))
    def cancel(self, which: int, gateway: str | None) -> None:
        only = GatewayId(gateway) if gateway else None
        self.run(self.world.cell.cancel(self.jobs[which % len(self.jobs)], "client", only))

    @precondition(lambda self: self.jobs)
    @rule(which=any_one, gateway=gateways)
    def attach(self, which: int, gateway: str) -> None:
        self.run(self.world.cell.attach(self.jobs[which % len(self.jobs)], GatewayId(gateway), f"gateway:{gateway}"))

    # --- dispatchers ---

    @rule(order=st.permutations(NODES), twice=st.booleans())
    def dispatch(self, order: list[str], twice: bool) -> None:
        self.run(self._dispatch(order, twice))

    async def _dispatch(self, order: list[str], twice: bool) -> None:
        cell = self.world.cell
        names = tuple(NodeId(name) for name in order)
        view = await cell.look()
        for queue in view.queues:
            picks = [Pick(h.entry_id, h.job_id, h.fence, h.out, names, new_nonce()) for h in queue.heads]
            await cell.assign(queue.queue, picks)
            if twice:  # another dispatcher that looked at the same time
                await cell.assign(queue.queue, picks)

    @rule()
    def sweep(self) -> None:
        self.run(self.world.sweep())

    # --- workers ---

    @rule(name=nodes)
    def read(self, name: str) -> None:
        self.attempts += self.run(self.world.read(name))

    def attempt(self, which: int) -> tuple[Assignment, NodeId, Any]:
        one = self.attempts[which % len(self.attempts)]
        node = NodeId(one.owner.partition(".")[0])
        return one, node, self.routes.get(f"{one.job_id}/{one.fence}", one.route)

    @precondition(lambda self: self.attempts)
    @rule(which=any_one, start=st.integers(0, 12), size=st.integers(0, 6))
    def flush(self, which: int, start: int, size: int) -> None:
        one, node, route = self.attempt(which)
        text = answer_of(one.job_id)[start : start + size]
        tokens = pack_tokens(list(text))
        piece = FlushPiece(one.job_id, one.fence, route, start, text, start, tokens)
        reply = self.guarded(self.world.cell.flush(one.owner, node, [piece]))
        if isinstance(reply, Moved):
            self.routes[f"{one.job_id}/{one.fence}"] = reply.route

    @precondition(lambda self: self.attempts)
    @rule(which=any_one, whole=st.booleans())
    def finish(self, which: int, whole: bool) -> None:
        """A worker that holds all text, or one whose flushes are still on their way."""
        one, node, route = self.attempt(which)
        start = 0 if whole else 8
        piece = FinishPiece(one.job_id, one.fence, route, start, answer_of(one.job_id)[start:], "stop")
        reply = self.guarded(self.world.cell.finish(one.owner, node, [piece]))
        if isinstance(reply, Moved):
            self.routes[f"{one.job_id}/{one.fence}"] = reply.route
        if isinstance(reply, Finished) and reply.state == "done":
            fences = self.ok_finishes.setdefault(one.job_id, set())
            fences.add(one.fence)
            assert len(fences) == 1, "two attempts were told that they finished the job"

    def guarded(self, work: Any) -> FlushReply | FinishReply | None:
        try:
            replies: list[Any] = self.run(work)
        except Superseded:
            return None
        reply: FlushReply | FinishReply = replies[0]
        assert not isinstance(reply, Stored | Gap) or reply.text_len <= 12
        return reply

    @precondition(lambda self: self.attempts)
    @rule(which=any_one, why=st.sampled_from(WHYS))
    def requeue(self, which: int, why: Any) -> None:
        one, _, _ = self.attempt(which)
        self.run(self.world.cell.requeue(one.job_id, one.fence, why, "machine"))

    @rule(name=nodes, listed=st.booleans())
    def renew(self, name: str, listed: bool) -> None:
        node, holder = NodeId(name), self.world.holders[NodeId(name)]
        held = [(one.job_id, one.fence) for one in self.attempts[-6:] if one.owner == holder] if listed else []
        self.guarded_renew(node, holder, held)

    def guarded_renew(self, node: NodeId, holder: Any, held: list[Any]) -> None:
        try:
            self.run(self.world.cell.renew(node, holder, held))
        except Superseded:
            pass

    # --- deaths and time ---

    @rule(name=nodes)
    def worker_process_dies(self, name: str) -> None:
        """Its parent says so, and a new one takes the node."""
        node = NodeId(name)
        self.run(self.world.cell.down(node, self.world.holders[node]))
        self.come_back(name)

    @rule(name=nodes)
    def worker_machine_is_lost(self, name: str) -> None:
        """Nobody says so; another worker takes the node, the reservations expire by and by."""
        self.run(self.world.age_lease(self.world.holders[NodeId(name)]))
        self.come_back(name)

    @rule(name=nodes)
    def worker_leaves(self, name: str) -> None:
        node, holder = NodeId(name), self.world.holders[NodeId(name)]
        self.run(self.world.cell.down(node, holder))
        self.run(self.world.publish(NodeBye(node, int(holder.rpartition(".")[2]))))
        self.come_back(name)

    def come_back(self, name: str) -> None:
        owned = self.run(self.world.cell.own(NodeId(name), name))
        assert isinstance(owned, Owned | HeldBy)
        if isinstance(owned, Owned):
            self.world.holders[NodeId(name)] = owned.holder
            self.beat(name)

    @rule(name=nodes)
    def beat(self, name: str) -> None:
        self.run(self.world.beat(name, capacity=CAPACITY[name], resume="d" if name == "a" else ""))

    @rule(name=nodes)
    def reservations_expire(self, name: str) -> None:
        self.run(self.world.age_reservations(name))

    @rule()
    def hold_backs_and_breakers_are_over(self) -> None:
        self.run(self.world.age_late())
        for name in NODES:
            self.run(self.link.send("HSET", self.world.cell.keys.node(NodeId(name)), "breaker_until", 1))

    @precondition(lambda self: self.jobs)
    @rule(which=any_one)
    def deadline_passes(self, which: int) -> None:
        job_id = self.jobs[which % len(self.jobs)]
        record = self.run(self.world.cell.job(job_id))
        if record is not None and not record.ended:
            self.run(self.world.age_deadline(job_id))

    @rule(gateway=gateways)
    def gateway_dies_and_returns(self, gateway: str) -> None:
        self.run(self.world.cell.drop_lease(gateway))
        self.run(self.world.sweep())
        self.run(self.world.cell.lease(gateway))

    @initialize()
    def start_with_work(self) -> None:
        for _ in range(2):
            self.submit(True, "cancel", "g1", True)

    @invariant()
    def everything_holds(self) -> None:
        texts = {job: answer_of(job) for job in self.jobs}
        self.run(check_invariants(self.world, self.jobs, texts))


def machine_on(server: ValkeyServer, cell: int) -> type[CellMachine]:
    return type("Machine", (CellMachine,), {"server": server, "cell_index": cell})


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@pytest.mark.parametrize("cell", [0, 2], ids=["P=1", "P=3"])
def test_random_interleavings_keep_the_invariants(server: ValkeyServer, cell: int):
    quick = settings(
        max_examples=15, stateful_step_count=40, derandomize=True, phases=(Phase.generate, Phase.shrink), **COMMON
    )
    run_state_machine_as_test(machine_on(server, cell), settings=quick)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [0, 2], ids=["P=1", "P=3"])
def test_long_random_interleavings_keep_the_invariants(server: ValkeyServer, cell: int):
    run_state_machine_as_test(
        machine_on(server, cell), settings=settings(max_examples=250, stateful_step_count=120, **COMMON)
    )
