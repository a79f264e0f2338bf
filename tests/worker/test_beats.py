"""What a worker's beat says, and which changes cannot wait for the next one."""

import asyncio
import math
import time

import msgspec
import pytest

from bus.codec.events import ForeignEntry, NodeBeat, event_fields, parse_event
from bus.codec.wire import Owned
from bus.ids import Holder, NodeId
from bus.jobs import Capability
from gpu_worker.beats import LOOK_S, is_news, make_beat, rest_s
from gpu_worker.engine import EngineInfo, EngineLoad
from gpu_worker.loop_lag import TICK_S, WINDOW, LoopLag

OWNED = Owned(NodeId("n1"), 7, Holder("n1.7"), ())
INFO = EngineInfo("echo", ("echo",), context_length=100, capacity=4, resume_digest="echo-1")
LOAD = EngineLoad(prefill_rate=1000, decode_rate=50, capacity=4, running=1, waiting=0)


def sent_and_read(beat: NodeBeat) -> NodeBeat:
    flat = event_fields(beat)
    fields = {
        str(key): value if isinstance(value, bytes) else str(value).encode()
        for key, value in zip(flat[::2], flat[1::2], strict=True)
    }
    read = parse_event(fields)
    assert isinstance(read, NodeBeat)
    return read


def test_a_beat_is_full_state_and_survives_the_wire():
    """Any one beat must be able to recreate the node after a FLUSHALL."""
    beat = make_beat(OWNED, INFO, LOAD)

    assert sent_and_read(beat) == beat
    assert (beat.holder, beat.models, beat.capacity, beat.resume) == ("n1.7", ("echo",), 4, "echo-1")


@pytest.mark.parametrize("can", [("logprobs",), (), None])
def test_a_beat_says_what_the_engine_says_that_it_can_do_or_nothing_of_it(can: tuple[Capability, ...] | None):
    """An older worker says nothing: that is not the same as being able to do nothing."""
    beat = make_beat(OWNED, msgspec.structs.replace(INFO, can=can), LOAD)

    assert sent_and_read(beat).can == can


@pytest.mark.parametrize("can", [("a b",), ("",), ("LOGPROBS:9",), ("x",) * 17])
def test_what_is_no_name_of_a_capability_is_foreign(can: tuple[str, ...]):
    beat = msgspec.structs.replace(make_beat(OWNED, INFO, LOAD), can=can)

    with pytest.raises(ForeignEntry, match="can must be"):
        sent_and_read(beat)


def test_small_changes_wait_for_the_next_beat_and_large_ones_do_not():
    told = make_beat(OWNED, INFO, LOAD)

    def with_load(**changes: float) -> bool:
        return is_news(told, make_beat(OWNED, INFO, msgspec.structs.replace(LOAD, **changes)))

    assert not with_load(running=2, decode_rate=55)
    assert with_load(decode_rate=80)
    assert with_load(running=0)
    assert with_load(capacity=2)
    assert is_news(told, make_beat(OWNED, INFO, LOAD, draining=True))


@pytest.mark.parametrize(
    ("measured", "told"),
    [(0.0, 0.0), (1234.56, 1234.6), (0.004, 0.1), (math.nan, 0.0), (math.inf, 0.0), (-3.0, 0.0), (1e300, 1e9)],
)
def test_a_rate_is_a_number_that_the_dispatcher_can_divide_by(measured: float, told: float):
    """0 means not measured; a slow node must not become an unknown one, and no figure may bury the beat."""
    beat = make_beat(OWNED, INFO, msgspec.structs.replace(LOAD, prefill_rate=measured, decode_rate=measured))

    assert (beat.prefill_rate, beat.decode_rate) == (told, told)
    assert sent_and_read(beat) == beat


@pytest.mark.parametrize(
    ("since_s", "rest"),
    [(0.0, LOOK_S), (9.2, 0.8), (9.9996, 0.0004), (10.0, LOOK_S), (12.0, LOOK_S)],
)
def test_a_beat_is_due_on_time_and_a_lost_one_is_tried_at_the_next_look(since_s: float, rest: float):
    assert rest_s(100.0 + since_s, 100.0, beat_s=10.0) == pytest.approx(rest)
    assert rest_s(100.5, 100.0, beat_s=0.3) == pytest.approx(0.3)


def test_speculation_and_the_loops_lag_travel_with_the_beat():
    lag = LoopLag()
    for late_s in [0.001] * 98 + [0.004, 0.5]:
        lag.note(late_s)

    beat = sent_and_read(make_beat(OWNED, INFO, msgspec.structs.replace(LOAD, drafted=10**12, accepted=7), lag=lag))

    assert (beat.drafted, beat.accepted) == (10**12, 7)
    assert (beat.loop_lag_ms, beat.loop_lag_max_ms) == (4.0, 500.0)


def test_the_loops_lag_is_of_the_last_ten_seconds():
    lag = LoopLag()
    assert (lag.p99_ms, lag.max_ms) == (0.0, 0.0)

    lag.note(3.0)
    for _ in range(WINDOW):
        lag.note(-0.001)  # a clock's hair

    assert (lag.p99_ms, lag.max_ms) == (0.0, 0.0)


async def test_a_loop_that_is_held_up_is_seen_to_be():
    lag = LoopLag()
    measuring = asyncio.create_task(lag.run())
    await asyncio.sleep(2 * TICK_S)

    time.sleep(0.1)  # noqa: ASYNC251 - somebody forgot the event loop
    await asyncio.sleep(TICK_S)
    measuring.cancel()

    assert lag.max_ms > 70
