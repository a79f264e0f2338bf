"""Between host and device without waiting: a step that waits for the device leaves it idle afterwards.

Copies are asynchronous only from and to pinned memory. torch hands pinned memory out again only when the copies that
were recorded on it are done, so none has to be kept here. On a CPU both directions are the tensor itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device. One that is there already stays as it is."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor
    if not tensor.numel():
        return torch.empty_like(tensor, device=device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Arrival:
    """Tensors on their way to the host, behind all that is launched so far."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [
                torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            ]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's stubs have no types for it
            self._done.record()

    def wait(self) -> list[Tensor]:
        """In the order given; only now may they be read."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors
