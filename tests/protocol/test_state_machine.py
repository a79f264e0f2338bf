"""The scripts in random interleavings on a real server, with zombies, deaths, take-overs and passing time.

Two nodes, two gateways. Workers remember every attempt they ever read and act on any of them, however stale. After
each step `check_invariants` reads the server. Every attempt at a job produces the same text, so a mix-up shows.
"""

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bus.codec.entries import Assignment
from bus.codec.events import NodeBye
from bus.codec.wire import (
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
from bus.ids import GatewayId, JobId, NodeId
from bus.link import Link, ServerAddress
from bus.settings import Settings
from tests.harness.servers import ValkeyServer
from tests.protocol.invariants import check_invariants
from tests.protocol.world import World, chat, make_world

NODES = ("a", "b")
CAPACITY = {"a": 2, "b": 1}
CONTEXT = {"a": 256, "b": 512}
WHYS = ("crash", "node_error", "unable", "outgrown", "drain", "unread", "relay_lost")
# Long times: they pass only when the machine says so, however slow it runs.
SETTINGS = Settings(
    queue_max=6, lease_ms=600_000, unread_ms=600_000, alone_ms=600_000, out_ttl_ms=900_000, node_ttl_ms=600_000
)

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
            await self.world.node(name, **self.abilities(name))
        await self.world.end_grace()

    def abilities(self, name: str) -> dict[str, Any]:
        return {"capacity": CAPACITY[name], "resume": "d" if name == "a" else "", "context_length": CONTEXT[name]}

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
    @rule(which=any_one, what=st.sampled_from(("submit again", "cancel", "client gone", "attach")), gateway=gateways)
    def caller_acts(self, which: int, what: str, gateway: str) -> None:
        job_id, cell, name = self.jobs[which % len(self.jobs)], self.world.cell, GatewayId(gateway)
        if what == "submit again":
            self.run(cell.submit(self.submissions[which % len(self.submissions)]))
        elif what == "attach":
            self.run(cell.attach(job_id, name, f"gateway:{name}"))
        else:
            self.run(cell.cancel(job_id, "client", name if what == "client gone" else None))

    # --- dispatchers ---

    @rule(order=st.permutations(NODES), twice=st.booleans(), read=st.booleans())
    def dispatch(self, order: list[str], twice: bool, read: bool) -> None:
        self.run(self._dispatch(order, twice))
        if read:
            for name in order:
                self.read(name)

    async def _dispatch(self, order: list[str], twice: bool) -> None:
        cell = self.world.cell
        names = tuple(NodeId(name) for name in order)
        view = await cell.look()
        for queue in view.queues:
            for head in queue.heads if twice else ():
                await cell.end_unserved(head.job_id, head.fence)
            picks = [Pick(h.entry_id, h.job_id, h.fence, h.out, names, new_nonce()) for h in queue.heads]
            await cell.assign(queue.queue, picks)
            if twice:  # another dispatcher that looked at the same time
                await cell.assign(queue.queue, picks)

    # --- workers ---

    def read(self, name: str) -> None:
        self.attempts += self.run(self.world.read(name))

    def attempt(self, which: int) -> tuple[Assignment, NodeId, Any]:
        """Mostly one of the latest, so that jobs get on; sometimes any zombie."""
        recent = self.attempts if which % 4 == 3 else self.attempts[-3:]
        one = recent[-1 - which // 4 % len(recent)]
        node = NodeId(one.owner.partition(".")[0])
        return one, node, self.routes.get(f"{one.job_id}/{one.fence}", one.route)

    @precondition(lambda self: self.attempts)
    @rule(which=any_one, start=st.integers(0, 12), size=st.integers(0, 6), fits=st.booleans())
    def flush(self, which: int, start: int, size: int, fits: bool) -> None:
        one, node, route = self.attempt(which)
        if fits:
            start = len(self.run(self.world.cell.text(one.job_id, one.fence)))
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
        one, node, _ = self.attempt(which)
        if why == "outgrown":
            self.run(self.world.cell.outgrow(one.job_id, one.fence, CONTEXT[node], "machine"))
        else:
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

    @rule(name=nodes, how=st.sampled_from(("process", "machine", "leaves")))
    def worker_dies(self, name: str, how: str) -> None:
        """process: its parent says so. machine: nobody does; reservations expire by and by. Another takes the node."""
        node, holder = NodeId(name), self.world.holders[NodeId(name)]
        if how == "machine":
            self.run(self.world.age_lease(holder))
        else:
            self.run(self.world.cell.down(node, holder))
        if how == "leaves":
            self.run(self.world.publish(NodeBye(node, int(holder.rpartition(".")[2]))))
        self.come_back(name)

    def come_back(self, name: str) -> None:
        owned = self.run(self.world.cell.own(NodeId(name), name))
        assert isinstance(owned, Owned | HeldBy)
        if isinstance(owned, Owned):
            self.world.holders[NodeId(name)] = owned.holder
            self.beat(name)

    def beat(self, name: str) -> None:
        self.run(self.world.beat(name, **self.abilities(name)))

    @rule(
        name=nodes, what=st.sampled_from(("reservations", "hold-backs", "beat", "deadline", "gateway")), which=any_one
    )
    def time_passes(self, name: str, what: str, which: int) -> None:
        world = self.world
        if what == "reservations":
            self.run(world.age_reservations(name))
        elif what == "hold-backs":
            self.run(world.age_late())
            for each in NODES:
                self.run(self.link.send("HSET", world.cell.keys.node(NodeId(each)), "breaker_until", 1))
        elif what == "deadline" and self.jobs and which % 2:
            job_id = self.jobs[which % len(self.jobs)]
            record = self.run(world.cell.job(job_id))
            if record is not None and not record.ended:
                self.run(world.age_deadline(job_id))
        elif what == "gateway" and which % 4 == 3:
            gateway = ("g1", "g2")[which // 4 % 2]
            self.run(world.cell.drop_lease(gateway))
            self.run(world.sweep())
            self.run(world.cell.lease(gateway))
        elif what == "beat":
            self.beat(name)
        self.run(world.sweep())

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


COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@pytest.mark.parametrize("cell", [0, 2], ids=["P=1", "P=3"])
def test_random_interleavings_keep_the_invariants(server: ValkeyServer, cell: int):
    quick = settings(
        max_examples=8, stateful_step_count=50, derandomize=True, phases=(Phase.generate, Phase.shrink), **COMMON
    )
    run_state_machine_as_test(machine_on(server, cell), settings=quick)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [0, 2], ids=["P=1", "P=3"])
def test_long_random_interleavings_keep_the_invariants(server: ValkeyServer, cell: int):
    run_state_machine_as_test(
        machine_on(server, cell), settings=settings(max_examples=100, stateful_step_count=120, **COMMON)
    )


def walk(machine: CellMachine, seed: int, steps: int) -> None:
    """Like the machine's own choices, but weighted so that most jobs get far: crashes, resumes, ends."""
    chance = random.Random(seed)
    weights = {
        "submit": 4,
        "dispatch": 7,
        "flush": 7,
        "finish": 4,
        "requeue": 2,
        "caller": 1,
        "renew": 2,
        "die": 1,
        "time": 3,
    }
    machine.start_with_work()
    for step in range(steps):
        big, name = chance.randrange(10**6), chance.choice(NODES)
        what = chance.choices(list(weights), list(weights.values()))[0]
        if what == "submit":
            machine.submit(chance.random() < 0.5, chance.choice(("cancel", "keep")), chance.choice(("g1", "g2")), False)
        elif what == "dispatch":
            machine.dispatch(chance.sample(NODES, 2), chance.random() < 0.3, chance.random() < 0.9)
        elif what == "flush" and machine.attempts:
            machine.flush(big, chance.randrange(13), chance.randrange(7), chance.random() < 0.7)
        elif what == "finish" and machine.attempts:
            machine.finish(big, chance.random() < 0.8)
        elif what == "requeue" and machine.attempts:
            machine.requeue(big, chance.choice(("crash", "crash", *WHYS)))
        elif what == "caller":
            machine.caller_acts(
                big,
                chance.choice(("submit again", "cancel", "client gone", "attach", "attach")),
                chance.choice(("g1", "g2")),
            )
        elif what == "renew":
            machine.renew(name, chance.random() < 0.8)
        elif what == "die":
            machine.worker_dies(name, chance.choice(("process", "machine", "leaves")))
        elif what == "time":
            machine.time_passes(
                name, chance.choice(("reservations", "hold-backs", "hold-backs", "beat", "deadline", "gateway")), big
            )
        try:
            machine.everything_holds()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {step}, after {what}: {error}") from error


def walk_on(server: ValkeyServer, cell: int, seed: int, steps: int) -> None:
    machine = machine_on(server, cell)()
    try:
        walk(machine, seed, steps)
        states = Counter(machine.run(machine.world.state(job)) for job in machine.jobs)
        assert states["done"] > 0, f"seed {seed} reaches too little: {states}"
    finally:
        machine.teardown()


@pytest.mark.parametrize(("cell", "seed"), [(0, 1), (2, 2)], ids=["P=1", "P=3"])
def test_a_long_walk_in_which_jobs_get_far_keeps_the_invariants(server: ValkeyServer, cell: int, seed: int):
    walk_on(server, cell, seed, 150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_long_walks_keep_the_invariants(server: ValkeyServer, seed: int):
    walk_on(server, seed % 2 * 2, seed, 500)
