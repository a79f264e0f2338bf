"""A torch engine from the settings. Imported only for `engine=torch`: it pulls in torch."""

import sys

from bus.settings import Settings
from gpu_worker.engine import Engine
from gpu_worker.model_files import resolve_model
from gpu_worker.torch_engine.assembly import assemble_for_good
from gpu_worker.torch_engine.bridge import TorchEngine
from gpu_worker.torch_engine.config import TorchEngineConfig

SWITCH_S = 0.001  # the event loop waits this long for the GIL while a step is in Python, not Python's usual 5 ms


def make_torch_engine(settings: Settings) -> Engine:
    """May convert a model for seconds. Raises EngineStartError with what to do."""
    sys.setswitchinterval(SWITCH_S)
    config = TorchEngineConfig.from_settings(settings, resolve_model(settings))
    return TorchEngine(config, assemble=assemble_for_good)
