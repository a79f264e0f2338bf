"""y = x W^T, the same bits for a row whatever rows are beside it.

A sequence must give the same greedy float32 text alone, in a batch, prefilled in chunks or resumed elsewhere. That
holds if each row's sums run in the same order for every number of rows. BLAS libraries promise no such thing (MKL takes
another path for 1-3 rows, measured), so each way to multiply is *probed* once with its real shape:

    | way         | what it is                                              | on this kind of CPU                      |
    |-------------|---------------------------------------------------------|------------------------------------------|
    | `packed`    | oneDNN, weight reordered once into its blocked layout   | float32 AVX2: invariant for all rows     |
    | `plain`     | torch's own F.linear                                    | float32 AVX2: invariant for rows % 4 = 0 |

`row_multiple` says what the probe found: rows are padded to it. None: no multiple helps; then rows go through in
tiles of `TILE_ROWS`, so that the shape is always the same one, and only the speed suffers.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)

RowOp = Callable[[Tensor], Tensor]  # (rows, in) -> (rows, out)
TILE_ROWS = 16
MULTIPLES = (1, 2, 4, 8, 16)
PROBE_ROWS = (1, 2, 3, 4, 5, 8, 12, 16, 31, 32, 64)


class Linear:
    """One weight matrix, held in whatever form its way of multiplying wants."""

    def __init__(self, multiply: RowOp, kind: str, row_multiple: int | None) -> None:
        self._multiply = multiply
        self.kind = kind
        self.row_multiple = row_multiple

    def __call__(self, x: Tensor) -> Tensor:
        """x: (rows, in), contiguous. Returns (rows, out)."""
        if self.row_multiple == 1:
            return self._multiply(x)
        if self.row_multiple is not None:
            return self._multiply(pad_rows(x, self.row_multiple))[: x.shape[0]]
        tiles = torch.split(pad_rows(x, TILE_ROWS), TILE_ROWS)
        return torch.cat([self._multiply(tile) for tile in tiles])[: x.shape[0]]


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    missing = -x.shape[0] % multiple
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


class LinearFactory:
    """Chooses a way once per weight shape, by probing, and says so in the log."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.exact = dtype == torch.float32 and device.type == "cpu"
        self._row_multiples: dict[tuple[str, int, int], int | None] = {}

    def build(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """weight: (out, in) in the engine's dtype on its device; the packed form keeps no reference to it."""
        kind, multiply = _packed(weight, bias) if self.device.type == "cpu" else ("plain", _plain(weight, bias))
        return Linear(multiply, kind, self._row_multiple(kind, multiply, weight))

    def _row_multiple(self, kind: str, multiply: RowOp, weight: Tensor) -> int | None:
        if not self.exact:
            return 1
        key = (kind, weight.shape[0], weight.shape[1])
        if key not in self._row_multiples:
            found = probe_row_multiple(multiply, weight.shape[1])
            self._row_multiples[key] = found
            log.info("matrix product chosen", extra={"kind": kind, "shape": key[1:], "row_multiple": found})
        return self._row_multiples[key]


def probe_row_multiple(multiply: RowOp, width: int) -> int | None:
    """The least multiple to pad rows to, so that every row's result is the same bits in every such batch."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(PROBE_ROWS[-1], width, generator=generator)
    whole = multiply(rows)
    same = {count: torch.equal(multiply(rows[:count]), whole[:count]) for count in PROBE_ROWS}
    same_elsewhere = torch.equal(multiply(rows[16:32]), whole[16:32])
    fitting = (m for m in MULTIPLES if all(same[count] for count in PROBE_ROWS if count % m == 0))
    return next(fitting, None) if same_elsewhere else None


def _plain(weight: Tensor, bias: Tensor | None) -> RowOp:
    return lambda x: functional.linear(x, weight, bias)


def _packed(weight: Tensor, bias: Tensor | None) -> tuple[str, RowOp]:
    """oneDNN with the weight in its own blocked layout; plain where this build or machine cannot."""
    try:
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        pointwise = torch.ops.mkldnn._linear_pointwise

        def multiply(x: Tensor) -> Tensor:
            result: Tensor = pointwise(x, blocked, bias, "none", [], "")
            return result

        multiply(torch.zeros(1, weight.shape[1], dtype=weight.dtype))
        return "packed", multiply
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # private ops: any build may lack them
        log.info("packed product not available", extra={"reason": str(error).splitlines()[0]})
        return "plain", _plain(weight, bias)
