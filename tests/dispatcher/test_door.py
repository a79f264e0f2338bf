"""Entries of the front door: each is admitted or refused with a reason, and always has somebody to answer."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.ids import cell_of_model
from dispatcher.door import DoorJob, DoorRefusal, read_entry

ENTRY = "1700000000000-3"
JOB = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]})


def read(*, at: int = 0, cells: int = 1, **fields: bytes) -> DoorJob | DoorRefusal:
    return read_entry(ENTRY, fields, cell=at, cells=cells, default_model="default-model")


def refused(**fields: bytes) -> DoorRefusal:
    result = read_entry(ENTRY, fields, cell=0, cells=1, default_model="default-model")
    assert isinstance(result, DoorRefusal)
    return result


def test_a_plain_entry_is_named_after_its_entry_id_and_answered_there() -> None:
    result = read(job=JOB)

    assert isinstance(result, DoorJob)
    assert result.job_id == f"c0-{ENTRY}"
    assert result.out == f"reply:c0-{ENTRY}"
    assert result.job.messages[0].content == "Hello"


def test_own_id_and_reply_name_are_the_producers_choice() -> None:
    result = read(job=JOB, id=b"order-7", reply=b"billing")

    assert isinstance(result, DoorJob)
    assert (result.job_id, result.out) == ("c0-order-7", "reply:billing")


def test_a_job_without_a_model_gets_the_fleets_default() -> None:
    result = read(job=b'{"messages":[{"role":"user","content":"x"}]}')

    assert isinstance(result, DoorJob)
    assert result.job.model == "default-model"


def test_the_wrong_cell_answers_with_the_right_one() -> None:
    home = cell_of_model("m", 3)
    wrong = (home + 1) % 3

    result = read(job=JOB, at=wrong, cells=3)

    assert isinstance(result, DoorRefusal)
    assert result.code == "wrong_cell"
    assert f"millrace:{{c{home}}}:jobs" in result.message


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"job": b""}, "invalid_json"),
        ({"job": b"not json"}, "invalid_json"),
        ({"job": b"[1]"}, "invalid_json"),
        ({"job": b"\xff\xfe"}, "invalid_json"),
        ({"job": b'{"messages": 5}'}, "invalid_type"),
        ({"job": JOB, "id": b"a b"}, "invalid_value"),
        ({"job": JOB, "id": b""}, "invalid_value"),
        ({"job": JOB, "id": b"x" * 97}, "invalid_value"),
        ({"job": JOB, "id": b"caf\xc3\xa9"}, "invalid_value"),
        ({"job": JOB, "reply": b"a:b"}, "invalid_value"),
        ({"job": JOB, "prio": b"1"}, "unknown_field"),
    ],
)
def test_a_malformed_entry_is_refused_with_its_reason(fields: dict[str, bytes], code: str) -> None:
    result = refused(**fields)

    assert result.code == code
    assert result.message


def test_a_refusal_goes_to_the_reply_stream_even_if_the_id_is_malformed() -> None:
    assert refused(job=JOB, id=b"a b", reply=b"billing").out == "reply:billing"
    assert refused(job=b"{", id=b"order-7").out == "reply:c0-order-7"
    assert refused(job=JOB, id=b"a b").out == f"reply:c0-{ENTRY}"


@given(st.dictionaries(st.sampled_from(["job", "id", "reply", "x", ""]), st.binary(max_size=60), max_size=4))
def test_nothing_that_anybody_can_xadd_raises(fields: dict[str, bytes]) -> None:
    result = read_entry(ENTRY, fields, cell=0, cells=2, default_model="d")

    assert result.out.startswith("reply:")
