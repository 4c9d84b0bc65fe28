"""From a configuration to an engine: one function a kind. What an engine stands on is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from stip_protocol.errors import ConfigurationError
from stip_server.config import TransformersSettings, VllmSettings
from stip_server.engine import Engine


async def _transformers(instance: Path, developer: Ed25519PublicKey, settings: TransformersSettings) -> Engine:
    import torch

    from stip_server.engines.transformers import TransformersEngine, card_for, load
    from stip_server.engines.transformers.parallel import Ranks, follow

    if settings.device != "cpu" and not torch.cuda.is_available():
        raise ConfigurationError.because("engine.device", settings.device, "cpu (this machine offers no CUDA device)")
    ranks = Ranks.join(settings)
    loaded = load(instance, developer, settings.device, settings.tensor_parallel)
    card = card_for(loaded.model, loaded.head, settings, manifest=loaded.manifest, digest=loaded.digest)
    if ranks is not None and ranks.rank > 0:
        follow(loaded.model, loaded.head, card, ranks)
        ranks.leave()
        raise SystemExit  # Its work is done: only rank 0 serves.
    return TransformersEngine(loaded.model, loaded.head, card, settings, ranks)


async def _vllm(instance: Path, developer: Ed25519PublicKey, settings: VllmSettings) -> Engine:
    if find_spec("vllm") is None:
        allowed = "transformers, or a Python environment in which vLLM is installed"
        raise ConfigurationError.because("engine.kind", settings.kind, allowed)
    from stip_server.engines.vllm.orphans import require_watch
    from stip_server.engines.vllm.surroundings import surround

    require_watch()
    surround(settings)
    from stip_server.engines.vllm.starting import start

    return await start(instance, developer, settings)


FACTORIES: Mapping[str, Callable[[Path, Ed25519PublicKey, Any], Awaitable[Engine]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
}
"""By `engine.kind`. Each loads an instance and raises `ConfigurationError` or `IntegrityError`."""
