"""The compiled kernels against torch in float64, and the promise that nothing beside a row changes its bits."""

import fcntl
import gc
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy
import pytest
import torch
from torch.nn import functional

from gpu_worker.torch_engine.batch import build_batch
from gpu_worker.torch_engine.kernels import LOCK, cache_directory
from gpu_worker.torch_engine.kernels.decoder import CompiledDecoder
from gpu_worker.torch_engine.kernels.functions import exponential, silu
from gpu_worker.torch_engine.kernels.operations import product_operations
from gpu_worker.torch_engine.kernels.packing import BLOCKS, PackedFactory, pack
from gpu_worker.torch_engine.kernels.products import ADD, GATED, KEEP
from gpu_worker.torch_engine.kernels.program import OPERATION, STEP, Team, address, aligned
from gpu_worker.torch_engine.kernels.ready import (
    compile_now,
    has_instructions,
    host_features,
    remove_unused,
    with_fresh_cache,
)
from gpu_worker.torch_engine.kernels.vectors import compiled, load, store
from gpu_worker.torch_engine.kernels.weights import BLOCK_BYTES, FORM_NAMES, PackedWeight
from gpu_worker.torch_engine.loader import load_weights
from gpu_worker.torch_engine.model_config import parse_config
from gpu_worker.torch_engine.plan import Plan, Work
from gpu_worker.torch_engine.quantized import Quantized, Weight
from gpu_worker.torch_engine.sequence import SamplingChoice, Sequence
from gpu_worker.torch_engine.stored import PIECE_VALUES, pieces
from tests.torch_engine.tiny import tiny_model

ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 40)
OUTPUTS, INPUTS = 112, 96


def make_weight(form: str, outputs: int = OUTPUTS, inputs: int = INPUTS) -> Weight:
    generator = torch.Generator().manual_seed(7)
    groups = (outputs, inputs // 32)
    scale = (torch.rand(groups, generator=generator) * 0.1).half()
    if form == "nibbles":
        values = torch.randint(0, 256, (outputs, inputs // 2), generator=generator, dtype=torch.uint8)
        return Quantized(4, values, scale, (-torch.rand(groups, generator=generator)).half())
    if form == "bytes":
        values = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        return Quantized(8, values, scale, None)
    floats = torch.randn(outputs, inputs, generator=generator)
    floats[0, 0] = 1e-9  # no float16
    if form == "half":
        return floats.half().float()
    return floats.bfloat16() if form == "bfloat" else floats


def whole(weight: Weight) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, Quantized) else weight.float()


def multiply(team: Team, weight: PackedWeight, x: numpy.ndarray, out: numpy.ndarray, mode: int) -> None:
    sums = numpy.zeros((len(x), weight.blocks), numpy.float32)
    program = numpy.array(product_operations(weight, x, out, mode, sums, team.threads), OPERATION)
    program["units"][:-1] = program["chunk"][:-1] = len(x)
    step = numpy.zeros(1, STEP)
    step["rows"] = len(x)
    team.run(program, step)


@pytest.fixture(scope="module")
def team():
    made = Team(2, 1 << 16)
    yield made
    made.close()


@pytest.fixture(scope="module")
def rows() -> numpy.ndarray:
    return numpy.random.default_rng(3).standard_normal((40, INPUTS)).astype(numpy.float32)


@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("outputs", [OUTPUTS, 100])  # whole panels, an odd number of them; and one that is padded
def test_each_form_of_weight_multiplies_right_for_any_number_of_rows(form, outputs, team, rows):
    weight = make_weight(form, outputs)
    bias = torch.linspace(-1, 1, outputs)
    packed = pack(weight, bias=bias)
    assert packed.kind == form
    exact = torch.from_numpy(rows).double() @ whole(weight).double().T + bias.double()
    found = []
    for count in ROWS:
        out = numpy.zeros((count, packed.panels * 16), numpy.float32)
        multiply(team, packed, rows[:count], out, KEEP)
        torch.testing.assert_close(torch.from_numpy(out[:, :outputs]).double(), exact[:count], rtol=1e-5, atol=1e-4)
        found.append(out)
    assert all((out == found[-1][: len(out)]).all() for out in found), "a row's bits depend on how many are beside it"


@pytest.mark.parametrize("form", FORM_NAMES)
def test_sums_can_be_added_to_what_is_there(form, team, rows):
    packed = pack(make_weight(form))
    for count in (1, 2, 9):
        kept, added = (numpy.full((count, OUTPUTS), 0.5, numpy.float32) for _ in range(2))
        multiply(team, packed, rows[:count], kept, KEEP)
        multiply(team, packed, rows[:count], added, ADD)
        assert (added == kept + numpy.float32(0.5)).all()


@pytest.mark.parametrize("form", FORM_NAMES)
def test_a_gate_and_its_up_projection_come_out_as_one(form, team, rows):
    weight = make_weight(form, 96)
    bias = torch.linspace(-1, 1, 96)
    packed = pack(weight[:48], weight[48:], bias=bias, gated=True)
    product = torch.from_numpy(rows).double() @ whole(weight).double().T + bias.double()
    exact = functional.silu(product[:, :48]) * product[:, 48:]
    for count in ROWS:
        out = numpy.zeros((count, 48), numpy.float32)
        multiply(team, packed, rows[:count], out, GATED)
        torch.testing.assert_close(torch.from_numpy(out).double(), exact[:count], rtol=1e-5, atol=1e-4)


def test_what_a_form_cannot_hold_exactly_goes_to_a_larger_one():
    floats = torch.randn(16, 32)
    assert pack(floats.half().float()).kind == "half"
    assert pack(floats.bfloat16().float() * 2.0**-60).kind == "bfloat"
    assert pack(floats * 1e-20).kind == "float"


@compiled
def apply_exponential(source: int, target: int) -> None:
    store(target, exponential(load(source)))


@compiled
def apply_silu(source: int, target: int) -> None:
    store(target, silu(load(source)))


def through(function, values: list[float]) -> torch.Tensor:
    source, target = (aligned(32).view(numpy.float32) for _ in range(2))
    source[:] = values
    function(address(source), address(target))
    return torch.from_numpy(target)


def test_the_exponential_is_right_to_the_last_bits():
    for start in numpy.arange(-87.0, 88.0, 0.37):
        values = [start + step * 0.01 for step in range(8)]
        exact = torch.tensor(values, dtype=torch.float32).double().exp()
        torch.testing.assert_close(through(apply_exponential, values).double(), exact, rtol=3e-7, atol=0)


def test_the_exponential_of_what_is_hidden_is_nothing():
    infinity, nan = float("inf"), float("nan")
    found = through(apply_exponential, [-infinity, -1000.0, -87.4, nan, 0.0, 88.0, 1000.0, infinity])
    assert found[:5].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert found[5:].isfinite().all() and (found[5:] > 1.6e38).all()


def test_silu_is_right_also_far_out():
    values = [-200.0, -88.0, -10.0, -0.5, 0.0, 0.5, 10.0, 200.0]
    torch.testing.assert_close(
        through(apply_silu, values), functional.silu(torch.tensor(values)), rtol=1e-6, atol=1e-30
    )


def test_the_same_bits_come_from_any_number_of_threads(rows):
    packed, found = pack(make_weight("nibbles")), []
    for threads in (1, 2, 3, 5):
        made = Team(threads, 1 << 16)
        for _ in range(20):
            out = numpy.zeros((40, OUTPUTS), numpy.float32)
            multiply(made, packed, rows, out, KEEP)
            found.append(out)
        made.close()
    assert all((out == found[0]).all() for out in found)


def tiny_decoder(directory: Path, *, threads: int, blocks: int) -> CompiledDecoder:
    tiny_model(directory)
    config = parse_config(json.loads((directory / "config.json").read_text()))
    weights = load_weights(directory, config, range(config.layers), PackedFactory(), lambda fraction: None)
    return CompiledDecoder(config, weights, blocks=blocks, context=128, threads=threads)


@torch.inference_mode()
def test_heads_may_be_units_of_their_own_or_one_together(tmp_path: Path) -> None:
    """Few single tokens are split by heads between the threads, many are not: the same bits."""
    generator = torch.Generator().manual_seed(3)
    tokens: list[list[int]] = torch.randint(1, 200, (8, 41), generator=generator).tolist()
    found = []
    for threads in (1, 2, 5):
        decoder = tiny_decoder(tmp_path, threads=threads, blocks=16)
        for together in (1, 3, 8):
            rows = []
            for at in range(0, 8, together):
                some = [sequence_in(own, [1 + 2 * at, 2 + 2 * at]) for at, own in enumerate(tokens)][at : at + together]
                prompts = Plan(prefill=tuple(Work(one, 0, tuple(one.tokens[:40]), 0) for one in some))
                decoder.forward(build_batch(prompts, block_tokens=decoder.block_tokens))
                answers = Plan(tuple(Work(one, 40, (one.tokens[40],), 1) for one in some))
                rows.append(decoder.forward(build_batch(answers, block_tokens=decoder.block_tokens)).clone())
            found.append(torch.cat(rows))
    assert all(torch.equal(one, found[0]) for one in found)


def sequence_in(tokens: list[int], blocks: list[int]) -> Sequence:
    made = Sequence("s", tokens, len(tokens), 0, 1024, SamplingChoice(0.0, 1.0, 0, 0))
    made.blocks = blocks
    return made


def test_a_decoder_that_is_dropped_ends_its_helpers(tmp_path: Path) -> None:
    decoder = tiny_decoder(tmp_path, threads=3, blocks=4)
    helpers = [one for one in threading.enumerate() if one.name.startswith("kernels-")]
    del decoder
    gc.collect()
    for helper in helpers:
        helper.join(1)
    assert sum(not helper.is_alive() for helper in helpers) >= 2


def test_a_helper_that_comes_late_finds_the_turn_closed():
    made = Team(1, 1 << 10)
    packed = pack(make_weight("half"))
    x, out = numpy.ones((1, INPUTS), numpy.float32), numpy.zeros((1, OUTPUTS), numpy.float32)
    multiply(made, packed, x, out, KEEP)
    before = out.copy()
    late = threading.Thread(target=made.help_once)
    late.start()
    late.join(10)
    assert not late.is_alive() and (out == before).all()


def test_many_turns_with_more_threads_than_cores_all_end(rows):
    made = Team(6, 1 << 16)
    packed = pack(make_weight("nibbles"))
    out = numpy.zeros((40, OUTPUTS), numpy.float32)
    until = time.monotonic() + 60
    for _ in range(300):
        multiply(made, packed, rows, out, KEEP)
        assert time.monotonic() < until
    made.close()


def test_a_cpu_without_fused_multiply_add_is_known():
    assert has_instructions("x86_64", {"fma": True, "f16c": True})
    assert not has_instructions("x86_64", {"fma": True})  # as in some virtual machines
    assert has_instructions("aarch64", {}) and not has_instructions("riscv64", {})
    assert "sse2" in host_features() or "neon" in host_features()


def test_damaged_kept_code_is_compiled_anew_once(tmp_path: Path):
    kept = tmp_path / "room" / "program.work_through.nbi"
    kept.parent.mkdir()
    kept.write_bytes(b"cut")

    def compile_all() -> None:
        if kept.exists():
            raise EOFError("Ran out of input")

    with_fresh_cache(compile_all, tmp_path)
    assert not kept.exists()


def test_a_compiler_that_fails_twice_is_not_tried_forever(tmp_path: Path):
    calls = []

    def compile_all() -> None:
        calls.append(1)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        with_fresh_cache(compile_all, tmp_path)
    assert len(calls) == 2


def test_a_block_has_the_bytes_that_the_kernels_step_over():
    assert [BLOCKS[form].itemsize for form in range(len(FORM_NAMES))] == list(BLOCK_BYTES)


@pytest.mark.parametrize("form", FORM_NAMES)
def test_parts_lie_one_below_the_other(form):
    """As one weight: queries, keys and values are one product."""
    weight = make_weight(form, 100)
    bias = torch.linspace(-1, 1, 100)

    parts, one = pack(weight[:48], weight[48:64], weight[64:], bias=bias), pack(weight, bias=bias)

    assert (parts.form, parts.outputs) == (one.form, one.outputs)
    assert parts.bias is not None and one.bias is not None
    assert (parts.data == one.data).all() and (parts.bias == one.bias).all()


def test_a_weight_of_many_pieces_is_packed_whole():
    weight = torch.arange(16 * 40, dtype=torch.float32).view(-1, 1) + torch.arange(PIECE_VALUES // 128)
    assert len(list(pieces(weight))) > 2

    packed = pack(weight)

    blocks = packed.data.view(numpy.float32).reshape(40, -1, 32, 16)
    assert (blocks.transpose(0, 3, 1, 2).reshape(weight.shape) == weight.numpy()).all()


CURRENT, OTHER = "kernels-00000000000000aa", "kernels-00000000000000bb"
NOW_S = time.time()


def kept_code(base: Path, name: str, *, unused_days: float, lock: bool = True) -> Path:
    """A directory of compiled code, as numba leaves it."""
    directory = base / name
    inner = directory / "kernels_1a2b"
    inner.mkdir(parents=True)
    (inner / "program.nbi").write_bytes(b"code")
    if lock:
        (directory / LOCK).touch()
    for path in (inner / "program.nbi", inner, *directory.iterdir(), directory):
        os.utime(path, (0, NOW_S - unused_days * 86_400))
    return directory


def test_code_that_nobody_started_with_for_a_month_is_removed(tmp_path: Path):
    """Each version leaves 5 MB; a node that is updated weekly would keep them all."""
    current = kept_code(tmp_path, CURRENT, unused_days=90)
    old = kept_code(tmp_path, OTHER, unused_days=31)
    older = kept_code(tmp_path, "kernels-00000000000000cc", unused_days=31, lock=False)  # of a version without locks
    used = kept_code(tmp_path, "kernels-00000000000000dd", unused_days=29)
    early = kept_code(tmp_path, "kernels-00000000000000ee", unused_days=-2)  # by a clock that is ahead

    assert remove_unused(current, NOW_S) == [old, older]
    assert sorted(tmp_path.iterdir()) == [current, used, early]
    assert remove_unused(current, NOW_S) == []


def test_only_the_lock_of_a_start_makes_old_code_used(tmp_path: Path):
    current, old = kept_code(tmp_path, CURRENT, unused_days=0), kept_code(tmp_path, OTHER, unused_days=90)
    os.utime(old / LOCK, (0, NOW_S - 86_400))

    assert remove_unused(current, NOW_S) == []
    assert old.exists()


def test_nothing_else_is_removed(tmp_path: Path):
    """The directory may be one that the user chose, with other things in it."""
    current = kept_code(tmp_path / "base", CURRENT, unused_days=0)
    for name in ("kernels-00000000000000bbb", "kernels-xyz", "torch_engine_1a", "my-kernels-00000000000000bb"):
        kept_code(tmp_path / "base", name, unused_days=90)
    target = kept_code(tmp_path, "elsewhere", unused_days=90)
    (tmp_path / "base" / OTHER).symlink_to(target)
    (tmp_path / "base" / "kernels-00000000000000ff").write_text("a file")
    before = sorted(tmp_path.rglob("*"))

    assert remove_unused(current, NOW_S) == []
    assert remove_unused(tmp_path / "base" / "millrace-kernels-x1", NOW_S) == []  # a directory of one process
    assert sorted(tmp_path.rglob("*")) == before


def test_code_that_somebody_is_compiling_stays(tmp_path: Path):
    current, old = kept_code(tmp_path, CURRENT, unused_days=0), kept_code(tmp_path, OTHER, unused_days=90)

    with (old / LOCK).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert remove_unused(current, NOW_S) == []

    assert remove_unused(current, NOW_S) == [old]


def test_workers_that_start_at_once_remove_it_once(tmp_path: Path):
    current = kept_code(tmp_path, CURRENT, unused_days=0)
    old = [kept_code(tmp_path, f"kernels-{index:016x}", unused_days=90) for index in range(40)]

    with ThreadPoolExecutor(8) as pool:
        removed = list(pool.map(lambda _: remove_unused(current, NOW_S), range(8)))

    assert sorted(path for one in removed for path in one) == old
    assert list(tmp_path.iterdir()) == [current]


def test_what_cannot_be_removed_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    current, old = kept_code(tmp_path, CURRENT, unused_days=0), kept_code(tmp_path, OTHER, unused_days=90)

    def refuse(*args: object, **kwargs: object) -> None:  # permissions do not stop the user root
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr(os, "unlink", refuse)

    assert remove_unused(current, NOW_S) == []
    assert remove_unused(tmp_path / "gone" / CURRENT, NOW_S) == []
    assert old.exists()


def test_a_start_marks_its_code_as_used_and_removes_the_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    directory = cache_directory()
    os.utime(directory / LOCK, (0, 0))
    old = kept_code(tmp_path, OTHER, unused_days=20_000)

    assert cache_directory() == directory
    imported_s = (directory / LOCK).stat().st_mtime
    os.utime(directory / LOCK, (0, 0))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(directory))
    compile_now(lambda line: None)

    assert min(imported_s, (directory / LOCK).stat().st_mtime) > time.time() - 600
    assert not old.exists() and directory.exists()
    shutil.rmtree(directory)  # by another worker, whose clock is wrong
    compile_now(lambda line: None)
    assert (directory / LOCK).exists()
