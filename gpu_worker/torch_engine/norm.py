"""RMS norm: x / sqrt(mean(x^2) + eps) * weight, over the last dimension. The same bits for a row in any batch."""

import torch
from torch import Tensor
from torch.nn import functional


class RmsNorm:
    def __init__(self, weight: Tensor, eps: float) -> None:
        self.width = weight.shape[0]
        self.weight, self.eps = weight, eps
        # torch's own is seven operations on a CPU. Four, with n = width: x / hypot(|x|, sqrt(n eps)) * (weight sqrt(n))
        self._direct = weight.device.type == "cpu" and weight.dtype == torch.float32
        self._raised = weight * self.width**0.5
        self._least = torch.tensor([(self.width * eps) ** 0.5], device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        if not self._direct:
            return functional.rms_norm(x, (self.width,), self.weight, self.eps)
        length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._least)
        return (x / length).mul_(self._raised)
