"""A process of vLLM ends with the one that started it, also where that was killed.

vLLM's scheduling process outlives a killed server and keeps the GPU. This is a plug-in of vLLM's (entry point group
`vllm.general_plugins`), which each of its processes runs before it does anything else. Processes that Ray starts are
Ray's to end.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from importlib.metadata import entry_points

from stip_protocol.errors import ConfigurationError

GROUP, NAME = "vllm.general_plugins", "stip"
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that comes when the parent dies. Linux."""


def require_watch() -> None:
    """Raise `ConfigurationError` where vLLM would not find this plug-in."""
    if NAME not in entry_points(group=GROUP).names:
        got = f"an installation without the entry point {NAME} in {GROUP}"
        raise ConfigurationError.because("stip", got, "one by pip (pip install -e . after an update)")


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. Nothing happens in the server itself, or off Linux."""
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent.pid:
        # It ended before the kernel was told.
        os._exit(1)
