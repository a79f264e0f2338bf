"""What a worker's beat says, and which changes cannot wait for the next one."""

import msgspec

from bus.codec.events import event_fields, parse_event
from bus.codec.wire import Owned
from bus.ids import Holder, NodeId
from gpu_worker.beats import is_news, make_beat
from gpu_worker.engine import EngineInfo, EngineLoad

OWNED = Owned(NodeId("n1"), 7, Holder("n1.7"), ())
INFO = EngineInfo("echo", ("echo",), context_length=100, capacity=4, resume_digest="echo-1")
LOAD = EngineLoad(prefill_rate=1000, decode_rate=50, capacity=4, running=1, waiting=0)


def test_a_beat_is_full_state_and_survives_the_wire():
    """Any one beat must be able to recreate the node after a FLUSHALL."""
    beat = make_beat(OWNED, INFO, LOAD)
    flat = event_fields(beat)

    fields = {
        str(key): value if isinstance(value, bytes) else str(value).encode()
        for key, value in zip(flat[::2], flat[1::2], strict=True)
    }

    assert parse_event(fields) == beat
    assert (beat.holder, beat.models, beat.capacity, beat.resume) == ("n1.7", ("echo",), 4, "echo-1")


def test_small_changes_wait_for_the_next_beat_and_large_ones_do_not():
    told = make_beat(OWNED, INFO, LOAD)

    def with_load(**changes: float) -> bool:
        return is_news(told, make_beat(OWNED, INFO, msgspec.structs.replace(LOAD, **changes)))

    assert not with_load(running=2, decode_rate=55)
    assert with_load(decode_rate=80)
    assert with_load(running=0)
    assert with_load(capacity=2)
    assert is_news(told, make_beat(OWNED, INFO, LOAD, draining=True))
