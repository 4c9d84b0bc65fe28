"""Between this process's memory and the device's.

A copy that the device makes by itself needs host memory that stays where it is (pinned). Copies up are only queued;
copies down are queued together and waited for once, so that a step waits for its device once. On a CPU there is
nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Transfer:
    """Copies for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._apart = device.type != "cpu"

    def up(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device. torch's own pool keeps the pinned copy until the device has read it."""
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._apart else tensor

    def down(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """To the host, all of them ready to be read."""
        if not self._apart:
            return list(tensors)
        pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for host, tensor in zip(pinned, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        torch.accelerator.current_stream(self._device).synchronize()
        return pinned
