"""Identifiers: distinct types, their shapes, and the cell that a job id names.

Nothing here touches Redis. An id that fails its pattern never reaches a key.
"""

import hashlib
import re
import secrets
from typing import NewType

JobId = NewType("JobId", str)  # "c2-<own id>": a job id begins with its cell
NodeId = NewType("NodeId", str)
GatewayId = NewType("GatewayId", str)  # one gateway or client process; names its out-stream
Holder = NewType("Holder", str)  # "<worker>.<epoch>": who holds a lease and owns a node
Fence = NewType("Fence", str)  # "<attempt>.<nonce>": one attempt at a job, unforgeable after a rollback
ModelName = NewType("ModelName", str)

NODE_ID_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
OWN_ID_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,96}")
MODEL_PATTERN = re.compile(r"(?!.*:parts$)[A-Za-z0-9_./@+:-]{1,128}")  # a key ends in <model>:parts
JOB_ID_PATTERN = re.compile(r"c(\d{1,4})-[A-Za-z0-9_.-]{1,96}")


def is_node_id(text: str) -> bool:
    return NODE_ID_PATTERN.fullmatch(text) is not None


def is_model_name(text: str) -> bool:
    return MODEL_PATTERN.fullmatch(text) is not None


def is_own_id(text: str) -> bool:
    return OWN_ID_PATTERN.fullmatch(text) is not None


def new_job_id(cell: int, own_id: str | None = None) -> JobId:
    return JobId(f"c{cell}-{own_id or secrets.token_hex(16)}")


def parse_cell(job_id: str, cells: int) -> int | None:
    """The cell a job id names, or None if the text is no job id of a layout with `cells` cells."""
    found = JOB_ID_PATTERN.fullmatch(job_id)
    if found is None:
        return None
    cell = int(found.group(1))
    return cell if cell < cells and str(cell) == found.group(1) else None


def rendezvous(key: str, candidates: list[str]) -> list[str]:
    """The candidates, best first, by highest random weight; stable when others come or go.

    Source: rendezvous hashing (Thaler and Ravishankar, 1996).
    """

    def weight(one: str) -> bytes:
        return hashlib.blake2b(f"{one}\0{key}".encode(), digest_size=8).digest()

    return sorted(candidates, key=weight, reverse=True)


def cell_of_model(model: str, cells: int) -> int:
    """A model lives in one cell with all its nodes and jobs, so no job is stranded beside an idle node."""
    return 0 if cells == 1 else int(rendezvous(model, [str(cell) for cell in range(cells)])[0])
