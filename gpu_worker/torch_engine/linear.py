"""y = x W^T, the same bits for a row whatever rows are beside it.

A sequence must give the same greedy float32 text alone, in a batch, prefilled in chunks or resumed elsewhere. That
holds if each row's sums run in the same order for every number of rows. BLAS libraries promise no such thing (MKL takes
another path for 1-3 rows, measured), so each way to multiply is *probed* once with its real shape:

    | way         | what it is                                              | on this kind of CPU                      |
    |-------------|---------------------------------------------------------|------------------------------------------|
    | `half`      | FBGEMM: the weight as float16, products in float32      | AVX2: invariant for rows % 3 = 0         |
    | `packed`    | oneDNN, weight reordered once into its blocked layout   | float32 AVX2: invariant for all rows     |
    | `plain`     | torch's own F.linear                                    | float32 AVX2: invariant for rows % 4 = 0 |

The first that is there is taken, never the one that measures best: engines on equal machines must choose alike,
whatever load they start under. `half` only holds a weight that float16 can hold exactly, if need be times a power of
two: one converted from GGUF, or nearly any that was bfloat16. It reads half the memory, and that is what few rows cost.

`row_multiple` says what the probe found: rows are padded to it. None: no multiple helps; then rows go through in
tiles of `TILE_ROWS`, so that the shape is always the same one, and only the speed suffers.
"""

import dataclasses
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.torch_engine.quantized import Quantized, Weight
from gpu_worker.torch_engine.stored import cat

log = logging.getLogger(__name__)

RowOp = Callable[[Tensor], Tensor]  # (rows, in) -> (rows, out)
TILE_ROWS = 16
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16)
PROBE_ROWS = 96  # a multiple of all of them
PROBE_ROWS_LARGE = 48  # of a weight that would make the probe slow
LARGE = 1 << 22
PART_ROWS = 4096  # of a weight looked at in one piece, so that copies stay small
HALF_EXPONENT_MAX = 15  # float16 ends just below 2^16


class Linear:
    """One weight matrix, held in whatever form its way of multiplying wants."""

    def __init__(self, multiply: RowOp, kind: str, row_multiple: int | None, weight_bytes: int) -> None:
        self._multiply = multiply
        self.kind = kind
        self.weight_bytes = weight_bytes
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


@dataclasses.dataclass(frozen=True)
class Missing:
    """A way to multiply that this machine, or this build of torch, does not have."""

    kind: str
    reason: str


class LinearFactory:
    """Chooses a way once per weight shape, by probing, and says so in the log."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.exact = dtype == torch.float32 and device.type == "cpu"
        self._row_multiples: dict[tuple[str, int, int], int | None] = {}
        self._missing: set[Missing] = set()  # that the log has: a model has a hundred matrices

    def build(self, *parts: Weight, bias: Tensor | None = None, gated: bool = False) -> Linear:
        """See loader.MatrixFactory. The packed forms keep no reference to the parts; gates lie before the rest."""
        weight = cat(parts, self.dtype, self.device)
        if isinstance(weight, Quantized):  # rounded to float16, 2^-12 beside steps of a sixteenth, so that `half` fits
            weight = weight.dequantize(torch.float16).to(self.dtype)
        kind, multiply = self._choose(weight, bias, of_file=weight is parts[0])
        each = 2 if kind == "half" else weight.itemsize
        return Linear(multiply, kind, self._row_multiple(kind, multiply, weight), each * weight.numel())

    def _choose(self, weight: Tensor, bias: Tensor | None, *, of_file: bool) -> tuple[str, RowOp]:
        """of_file: it may be a view of the file, which must not stay open."""
        if self.device.type == "cpu":
            for way in (_half, _packed) if self.exact else (_packed,):
                found = way(weight, bias)
                if isinstance(found, Missing):
                    self._say_once(found)
                elif found is not None:
                    return found
            weight = weight.clone() if of_file else weight
        return "plain", _plain(weight, bias)

    def _say_once(self, missing: Missing) -> None:
        if missing not in self._missing:
            self._missing.add(missing)
            log.info("a matrix product is not available", extra={"kind": missing.kind, "reason": missing.reason})

    def _row_multiple(self, kind: str, multiply: RowOp, weight: Tensor) -> int | None:
        if not self.exact:
            return 1
        key = (kind, weight.shape[0], weight.shape[1])
        if key not in self._row_multiples:
            most = PROBE_ROWS if weight.numel() < LARGE else PROBE_ROWS_LARGE
            found = probe_row_multiple(multiply, weight.shape[1], most)
            self._row_multiples[key] = found
            log.info("matrix product chosen", extra={"kind": kind, "shape": key[1:], "row_multiple": found})
        return self._row_multiples[key]


def probe_row_multiple(multiply: RowOp, width: int, most: int = PROBE_ROWS) -> int | None:
    """The least multiple to pad rows to, so that every row's result is the same bits in every such batch.

    most: rows to try, a multiple of all MULTIPLES. The last rows of the whole are tried as batches of their own, so
    a row is seen in other numbers and at other places.
    """
    rows = torch.randn(most, width, generator=torch.Generator().manual_seed(1))
    whole = multiply(rows)
    counts = [count for count in range(1, most) if count <= 9 or count in (12, 16) or count % 12 in (0, 3, 4, 6, 8)]
    same = {count: torch.equal(multiply(rows[-count:]), whole[-count:]) for count in counts}
    return next((m for m in MULTIPLES if all(same[count] for count in counts if count % m == 0)), None)


def _plain(weight: Tensor, bias: Tensor | None) -> RowOp:
    return lambda x: functional.linear(x, weight, bias)


def half_exponent(weight: Tensor) -> int | None:
    """The n for which float16 holds weight * 2^n exactly; None if there is none."""
    largest = max(abs(float(edge)) for edge in weight.aminmax())
    if largest == 0.0 or not math.isfinite(largest):
        return None if largest else 0
    fitting = HALF_EXPONENT_MAX - math.frexp(largest)[1]
    return next((n for n in (0, fitting) if all(_fits(part * 2.0**n) for part in torch.split(weight, PART_ROWS))), None)


def _fits(scaled: Tensor) -> bool:
    return torch.equal(scaled.half().float(), scaled)


def _half(weight: Tensor, bias: Tensor | None) -> tuple[str, RowOp] | Missing | None:
    """FBGEMM with the weight in float16. None where that would lose a bit."""
    exponent = half_exponent(weight)
    if exponent is None:
        return None
    raised, lowered = 2.0**exponent, 2.0**-exponent
    try:
        scaled = weight * raised if exponent else weight
        packed = torch.ops.quantized.linear_prepack_fp16(scaled, None if bias is None else bias * raised)
        dynamic = torch.ops.quantized.linear_dynamic_fp16

        def multiply(x: Tensor) -> Tensor:
            result: Tensor = dynamic(x, packed)
            return result if exponent == 0 else result.mul_(lowered)

        multiply(torch.zeros(1, weight.shape[1]))
        return "half", multiply
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # x86 builds with FBGEMM only
        return Missing("half", str(error).splitlines()[0])


def _packed(weight: Tensor, bias: Tensor | None) -> tuple[str, RowOp] | Missing:
    """oneDNN with the weight in its own blocked layout."""
    try:
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        pointwise = torch.ops.mkldnn._linear_pointwise

        def multiply(x: Tensor) -> Tensor:
            result: Tensor = pointwise(x, blocked, bias, "none", [], "")
            return result

        multiply(torch.zeros(1, weight.shape[1], dtype=weight.dtype))
        return "packed", multiply
    except (RuntimeError, AttributeError, NotImplementedError) as error:  # private ops: any build may lack them
        return Missing("packed", str(error).splitlines()[0])
