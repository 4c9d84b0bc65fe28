"""Whether a server's configuration means what its source's means, to the classes that run both.

A server's `config.json` holds the fields that a family's tables know. A field that they do not know, of a newer
version of transformers or of a form that nobody thought of, would be left behind, and the class would take its
default: another model. Both configurations are therefore read by the class itself, and compared as it reads them,
before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from stip_keyservice.protect.plan import Plan
from stip_protocol.errors import CheckpointInvalid

_TRAINING = {
    "attention_dropout",
    "attn_pdrop",
    "classifier_dropout",
    "dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "initializer_range",
    "init_std",
    "layerdrop",
    "pretraining_tp",  # how a training was spread; the class does not read it
    "resid_pdrop",
    "residual_dropout",
    "router_aux_loss_coef",
    "router_jitter_noise",
}
_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
"""What to generate until; in an embedding, which row gets no gradient."""
_OUTPUTS = {"output_hidden_states", "output_router_logits", "return_dict", "use_cache"}
_NAMES = {"architectures", "id2label", "label2id", "problem_type", "transformers_version"}
_OTHER_HEADS = {
    "num_labels",
    "summary_activation",
    "summary_first_dropout",
    "summary_last_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
}
_UNREAD = {
    "chunk_size_feed_forward",  # the same values, in pieces
    "dtype",  # that of the tensors is stated instead
    "is_decoder",  # a warning
    "is_encoder_decoder",
}
INERT = frozenset(_TRAINING | _IDS | _OUTPUTS | _NAMES | _OTHER_HEADS | _UNREAD)
"""Fields of classes that cannot change what an evaluation computes."""
READ_UNDECLARED = frozenset(
    {
        "attention_chunk_size",  # the cache
        "is_causal",  # the mask
        "num_kv_shared_layers",  # the cache
        "sliding_window",  # the cache, of models whose masks have no window too
    }
)
"""What the masks and caches of transformers read of any configuration, whether or not its class declares it."""
_SHOWN = 160
"""Characters of a value in an error."""


def require_same_meaning(source: Mapping[str, Any], planned: Plan) -> None:
    """Refuse a configuration `source` that says something which the server's, `planned.config`, does not.

    Raises `CheckpointInvalid` where the class of transformers does not take one of them, and naming the first field
    of the class that it would read otherwise on the server. Fields that no class reads, and `INERT` ones, are free.
    """
    meant = dict(_meaning(_read(source, "config")))
    kept = dict(_meaning(_read(planned.config, "server's config")))
    # The server's own: rows that it has no use for are not there, and a tied head is stored like any other.
    kept |= {"vocab_size": planned.vocabulary, "tie_word_embeddings": bool(planned.architecture.tied)}
    for name, value in meant.items():
        if kept[name] != value:
            raise CheckpointInvalid.because(f"config.{name}", f"{_shown(kept[name])} on the server", _shown(value))


def _read(config: Mapping[str, Any], name: str) -> PretrainedConfig:
    """The configuration as its class reads it, which changes nested values of what it is given."""
    kind = CONFIG_MAPPING[config["model_type"]]
    try:
        return kind.from_dict(deepcopy(dict(config)))
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        found = " ".join(str(error).split())
        named = re.search(r"for field '(\w+)'", found)
        raise CheckpointInvalid.because(
            f"{name}.{named[1]}" if named else name, found[:_SHOWN], f"what {kind.__name__} takes"
        ) from None


def _meaning(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    declared = {field.name for field in fields(config)}
    for name in sorted((declared | READ_UNDECLARED) - INERT):
        yield name, getattr(config, name, None)
    # Some classes read it undeclared, and take the quotient where it is missing.
    yield "head_dim", getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
