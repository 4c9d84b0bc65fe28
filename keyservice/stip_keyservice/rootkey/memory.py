"""What a service that holds root keys and private keys denies its host: core dumps, and others who attach."""

from __future__ import annotations

import ctypes
import resource

import structlog

PR_SET_DUMPABLE = 4
"""prctl(2): 0 refuses core dumps, also where they go to a program, which RLIMIT_CORE does not; it also keeps other
processes of the same user from attaching and from reading /proc/PID/mem."""


def refuse_dumps() -> None:
    """For the rest of this process's life. What the system refuses is logged: Gramine knows no such call, and there
    memory is closed anyway."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        structlog.get_logger().error("the process could not be made undumpable", errno=ctypes.get_errno())
