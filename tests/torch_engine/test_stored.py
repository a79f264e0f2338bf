"""Weights are looked at piece by piece; what is found does not depend on where a piece ends."""

import pytest
import torch

from gpu_worker.torch_engine.quantized import Quantized
from gpu_worker.torch_engine.stored import PIECE_ROWS, PIECE_VALUES, alike, cat, is_finite, pieces, same, smallest_dtype

CPU = torch.device("cpu")
WIDTH = 2048
ROWS = 3 * PIECE_VALUES // WIDTH + 5  # several pieces, and a rest


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (7, 3), (40, 3 * PIECE_VALUES), (PIECE_VALUES + 1,)])
def test_pieces_are_all_rows_once_and_small(shape: tuple[int, ...]) -> None:
    weight = torch.empty(shape, device="meta")

    found = list(pieces(weight))

    assert [row for rows in found for row in range(weight.shape[0])[rows]] == list(range(weight.shape[0]))
    assert all(rows.start % PIECE_ROWS == 0 for rows in found)
    assert all(weight[rows].numel() <= PIECE_VALUES or rows.stop - rows.start <= PIECE_ROWS for rows in found)


def weight_with(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ones, and this value at the very end."""
    weight = torch.ones(ROWS, WIDTH, dtype=dtype)
    weight[-1, -1] = value
    return weight


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (weight_with(2.0**-20), torch.float16),
        (weight_with(2.0**-40), torch.bfloat16),
        (weight_with(1 + 2.0**-20), torch.float32),
        (weight_with(65504, torch.float16), torch.float16),
        (weight_with(2.0**-3, torch.bfloat16), torch.bfloat16),
        (weight_with(2.0**-40, torch.float64), torch.bfloat16),
        (weight_with(2.0**-40, torch.float64).mul_(1 + 2.0**-50), torch.bfloat16),  # as far as float32 goes
    ],
)
def test_the_smallest_type_holds_every_number(weight: torch.Tensor, dtype: torch.dtype) -> None:
    assert smallest_dtype([weight]) == dtype
    assert torch.equal(weight.to(dtype).float(), weight.float())


def test_the_smallest_type_suits_all_parts() -> None:
    half, brain = weight_with(1 + 2.0**-10, torch.float16), weight_with(2.0**-40, torch.bfloat16)
    quantised = Quantized(8, torch.ones(16, WIDTH, dtype=torch.int8), torch.ones(16, WIDTH // 32).half(), None)

    assert smallest_dtype([half, brain]) == torch.float32
    assert smallest_dtype([weight_with(1, torch.float16), brain]) == torch.bfloat16
    assert smallest_dtype([half, quantised]) == torch.float16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_value_that_is_no_number_is_found(value: float, dtype: torch.dtype) -> None:
    assert is_finite(weight_with(1, dtype))
    assert not is_finite(weight_with(value, dtype))
    assert not is_finite(weight_with(value, dtype)[-1])


def test_weights_are_the_same_if_their_numbers_are() -> None:
    one = weight_with(1 + 2.0**-10)

    assert same(one, one.half(), torch.float32)
    assert not same(one, one.bfloat16(), torch.float32)
    assert same(one, one.bfloat16(), torch.bfloat16)
    assert not same(one, weight_with(1), torch.float32)


def test_parts_of_other_kinds_come_together_in_one_type() -> None:
    quantised = Quantized(8, torch.full((16, 32), 3, dtype=torch.int8), torch.full((16, 1), 0.5).half(), None)
    floats = torch.linspace(-1, 1, 8 * 32).view(8, 32)

    found = cat([floats.bfloat16(), quantised, floats.double()], torch.float32, CPU)

    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, torch.cat([floats.bfloat16().float(), torch.full((16, 32), 1.5), floats]))
    assert not alike([quantised, floats])
    assert alike([quantised, quantised])
