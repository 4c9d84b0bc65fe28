"""The engine on transformers."""

from stip_server.engines.transformers.engine import TransformersEngine
from stip_server.engines.transformers.loading import Loaded, card_for, load, split

__all__ = ["Loaded", "TransformersEngine", "card_for", "load", "split"]
