"""The front door: what an entry of the `jobs` stream asks for, or why it cannot be admitted. Pure.

    XADD millrace:{c0}:jobs * job '<JSON as /v1/chat/completions takes it>' [id <own id>] [reply <name>]

Whatever is wrong, there is somebody to answer: the reply stream that the entry names, else the one named like its job.
"""

from collections.abc import Mapping

import msgspec

from bus.chat_request import BadRequest, parse_chat
from bus.ids import JobId, cell_of_model, is_own_id, new_job_id
from bus.jobs import ChatJob

FIELDS = ("job", "id", "reply")


class DoorJob(msgspec.Struct, frozen=True):
    """An entry that can be admitted."""

    job_id: JobId
    job: ChatJob
    out: str  # "reply:<name>"


class DoorRefusal(msgspec.Struct, frozen=True):
    """An entry that is answered with an error and becomes a dead letter."""

    job_id: JobId
    code: str
    message: str
    out: str


def read_entry(
    entry_id: str, fields: Mapping[str, bytes], *, cell: int, cells: int, default_model: str
) -> DoorJob | DoorRefusal:
    """Never raises: every malformed entry has its reason."""
    own_id = _name(fields.get("id"))
    job_id = new_job_id(cell, own_id or entry_id)
    out = f"reply:{_name(fields.get('reply')) or job_id}"

    def refuse(code: str, message: str) -> DoorRefusal:
        return DoorRefusal(job_id, code, message, out)

    foreign = sorted(set(fields) - set(FIELDS))
    if foreign:
        return refuse(
            "unknown_field", f"unknown field {foreign[0][:64]!r}: an entry has the fields {', '.join(FIELDS)}"
        )
    for field in ("id", "reply"):
        if field in fields and _name(fields[field]) is None:
            return refuse("invalid_value", f"{field} must be 1 to 96 characters of A-Z a-z 0-9 _ . -")
    if "job" not in fields:
        return refuse("missing_required_parameter", "the field job is missing: JSON as /v1/chat/completions takes it")
    try:
        job = parse_chat(fields["job"], default_model).job
    except BadRequest as error:
        return refuse(error.code, f"{error.field}: {error.message}" if error.field else error.message)
    home = cell_of_model(job.model, cells)
    if home != cell:
        return refuse("wrong_cell", f"model {job.model} lives in cell {home}: XADD to millrace:{{c{home}}}:jobs")
    return DoorJob(job_id, job, out)


def _name(raw: bytes | None) -> str | None:
    """An id or reply name, None if absent or malformed. Bytes that are no ASCII never match the pattern."""
    text = (raw or b"").decode("ascii", "replace")
    return text if is_own_id(text) else None
