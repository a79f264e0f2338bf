"""One tiny model for all tests of the engine; the real one where a test asks for it."""

from pathlib import Path

import pytest
import torch

from gpu_worker import model_files
from gpu_worker.torch_engine.assembly import Assembled
from tests.torch_engine.tiny import tiny_engine, tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from a second thread, and on a busy machine each step would wait for it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(model_dir: Path) -> Assembled:
    return tiny_engine(model_dir)


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """The default model, where `make run` keeps it; fetched if it is not there yet."""
    return model_files.fetch(Path(__file__).parents[2] / "var", model_files.show_nothing)
