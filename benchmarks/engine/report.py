"""The figures as Markdown. Pure."""

import dataclasses
from collections.abc import Mapping, Sequence

from benchmarks.engine.costs import StepCost
from benchmarks.engine.figures import Figures

HEAD = (
    "| requests | | decode tokens/s | whole burst tokens/s | first token p50 / max ms | between tokens p50 / p99 ms"
    " | memory MiB | of bandwidth | of products |\n|---:|---|---:|---:|---:|---:|---:|---:|---:|"
)
SEVERAL_PROCESSES = 1.05  # more than the largest process has: then both are shown


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    figures: Figures
    cost: StepCost | None  # None: nothing is known of its storage


def table(rows: Sequence[Row], *, bandwidth: float, products: float) -> str:
    """By requests, and within that in the order given. bandwidth: bytes/s; products: operations/s."""
    ordered = sorted(rows, key=lambda row: row.figures.requests)
    return "\n".join([HEAD, *(line(row, bandwidth, products) for row in ordered)])


def line(row: Row, bandwidth: float, products: float) -> str:
    found = row.figures
    shares = ("-", "-")
    if row.cost is not None and found.decode_rate is not None:
        steps = found.decode_rate / found.requests
        shares = (f"{steps * row.cost.bytes_read / bandwidth:.0%}", f"{steps * row.cost.operations / products:.0%}")
    memory = f"{found.peak_mib:.0f}"
    if found.peak_mib > SEVERAL_PROCESSES * found.largest_mib:
        memory += f", largest {found.largest_mib:.0f}"
    cells = (
        str(found.requests),
        row.name,
        f"{rate(found.decode_rate)} (best {rate(found.decode_rate_best)})",
        f"{found.whole_rate:.1f}",
        f"{found.first_p50_ms:.0f} / {found.first_max_ms:.0f}",
        f"{found.between_p50_ms:.1f} / {found.between_p99_ms:.1f}",
        memory,
        *shares,
    )
    return f"| {' | '.join(cells)} |"


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def skipped(reasons: Mapping[str, str]) -> str:
    return "\n".join(f"- not measured: {name}: {reason}" for name, reason in reasons.items())
