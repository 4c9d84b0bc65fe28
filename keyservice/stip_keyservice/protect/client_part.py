"""The client part: what users get beside the instance's name, which is the tokenizer and when to stop.

The tokenizer is public to users and never travels to the operator. Its files are copied as they are; the
client reads them, the key service and the server do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from stip_keyservice.protect.storage.checkpoint import GENERATION_CONFIG, Checkpoint
from stip_keyservice.protect.storage.headers import opened
from stip_keyservice.protect.storage.writer import DigestedFile, write_document
from stip_protocol.errors import CheckpointInvalid
from stip_protocol.manifest import ClientManifest, FileDigest

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
"""Names under which Hugging Face stores tokenizers and chat templates."""
GENERATION_DEFAULTS = ("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens")
"""Fields of generation_config.json that a client may take as defaults of its sampling."""
COPY_BYTES = 1 << 20
"""Bytes of a tokenizer's file that are held at a time."""


def write_client_part(
    folder: Path,
    source: Checkpoint,
    developer: Ed25519PrivateKey,
    *,
    instance: str,
    epoch: int,
    vocabulary: int,
    max_positions: int,
) -> ClientManifest:
    """Copy the tokenizer, note stop ids and sampling defaults, sign. `folder` exists and is empty.

    A model without a tokenizer gives a part without one: its users bring token ids.
    """
    stop_ids = stop_ids_of(source, vocabulary)
    present = [name for name in TOKENIZER_FILES if (source.directory / name).is_file()]
    files = {name: _copied(source.directory / name, folder / name) for name in present}
    defaults = {
        name: source.generation_config[name] for name in GENERATION_DEFAULTS if name in source.generation_config
    }
    stored = (json.dumps(defaults, indent=2) + "\n").encode()
    files[GENERATION_CONFIG] = write_document(folder / GENERATION_CONFIG, stored)
    manifest = ClientManifest(
        instance=instance,
        epoch=epoch,
        vocabulary=vocabulary,
        max_positions=max_positions,
        stop_ids=stop_ids,
        files=dict(sorted(files.items())),
    )
    manifest.write(folder / "manifest.json", developer)
    return manifest


def _copied(source: Path, path: Path) -> FileDigest:
    """Copy one file; gives the digest of what was written. Raises `CheckpointInvalid`."""
    copy = DigestedFile(path)
    try:
        for data in _pieces(source):
            copy.write(data)
        return copy.keep()
    finally:
        copy.close()


def _pieces(source: Path) -> Iterator[bytes]:
    """A file's content; what fails to be written is not said of what is read."""
    with opened(source) as file:
        while data := file.read(COPY_BYTES):
            yield data


def stop_ids_of(source: Checkpoint, vocabulary: int) -> tuple[int, ...]:
    """The ids after which an answer ends: of the generation configuration, else of the model's.

    Ids beyond the vocabulary, which a configuration may keep from a larger sibling, never occur and are left
    out. Raises `CheckpointInvalid` where a value is no id.
    """
    stated: Any = source.generation_config.get("eos_token_id", source.config.get("eos_token_id"))
    ids = [] if stated is None else stated if isinstance(stated, list) else [stated]
    for value in ids:
        if type(value) is not int or value < 0:
            raise CheckpointInvalid.because("eos_token_id", ascii(value)[:64], "a token id, a list of them, or null")
    return tuple(dict.fromkeys(value for value in ids if value < vocabulary))
