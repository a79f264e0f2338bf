"""A torch engine from the settings. Imported only for `engine=torch`: it pulls in torch."""

from bus.settings import Settings
from gpu_worker.engine import Engine
from gpu_worker.model_files import resolve_model
from gpu_worker.torch_engine.bridge import TorchEngine
from gpu_worker.torch_engine.config import TorchEngineConfig


def make_torch_engine(settings: Settings) -> Engine:
    """May convert a model for seconds. Raises EngineStartError with what to do."""
    return TorchEngine(TorchEngineConfig.from_settings(settings, resolve_model(settings)))
