"""What vLLM takes from the environment. It is set before vLLM is imported, and its processes inherit it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping

from stip_server.config import VllmSettings

LOOPBACK, LOOPBACK_DEVICE = "127.0.0.1", "lo"
QUIET: Mapping[str, str] = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # `orphans`, and nothing else that happens to be installed: plug-ins have a say in what is loaded and computed.
    "VLLM_PLUGINS": "stip",
    "VLLM_TRACE_FUNCTION": "0",
    # Standard output belongs to the announcement of this process.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TOKENIZERS_PARALLELISM": "false",
}
"""No reports home, no downloads, no foreign plug-ins, no traces."""
LOUD = (
    # By which prompts could be written down or fetched for.
    "VLLM_LOGGING_CONFIG_PATH",
    "VLLM_DEBUG_DUMP_PATH",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_USE_MODELSCOPE",
    # Another folder in place of the one whose digests were checked.
    "VLLM_MODEL_REDIRECT_PATH",
    # Pickled objects between processes.
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    # What the settings say, said otherwise.
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
    "VLLM_RPC_BASE_PATH",
)
"""Variables that would undo what is promised: taken out."""


def surround(settings: VllmSettings) -> None:
    """Set this process' environment. Before vLLM is imported."""
    os.environ.update(QUIET)
    for name in LOUD:
        os.environ.pop(name, None)
    os.environ["VLLM_LOGGING_LEVEL"] = settings.log_level.upper()
    # Cores are the operator's to hand out (taskset, cgroups): vLLM would pin itself to cores that others use.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if settings.distributed_backend != "ray":
        # Workers of one machine meet here; vLLM would ask the system for its way to a public address, and meet there.
        os.environ["VLLM_HOST_IP"] = LOOPBACK
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK_DEVICE
    if settings.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    if settings.tensor_parallel * settings.pipeline_parallel == 1:
        # One process for scheduling and computing instead of two: a start that is half as long, a hop less a step.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    _keep_apart()


def _keep_apart() -> None:
    """Sockets, rendezvous files and compiled code go to a folder that only this user can enter, and that goes with
    this process: vLLM leaves them behind, and torch's own place for compiled code has a name that anyone can take
    first."""
    folder = tempfile.mkdtemp(prefix="stip-vllm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
