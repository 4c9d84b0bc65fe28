"""The tokenizer of an instance: text to ids and back, on the user's machine, so that an enclave sees ids only.

The files come with a manifest signed by the model developer: what is parsed is what was hashed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from stip.chat import ChatTemplate
from stip_protocol.errors import ConfigurationError, ManifestMismatch
from stip_protocol.manifest import ClientManifest, check_files

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """Encodes prompts and decodes answers with the files of one verified `client/` folder.

    A model may come without a tokenizer: its users bring ids, and its answers are ids without text.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer | None, manifest: ClientManifest, template: ChatTemplate | None = None
    ) -> None:
        self._backend = backend
        self.manifest = manifest
        self.template = template
        self.silent: frozenset[int] = frozenset()
        """Ids of special tokens, which an answer's text leaves out."""
        self.fallback_bytes: frozenset[int] = frozenset()
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            added = backend.get_added_tokens_decoder()
            self.silent = frozenset(id_ for id_, token in added.items() if token.special)
            self.fallback_bytes = _fallback_bytes(backend)

    @classmethod
    def open(cls, folder: Path, developer: Ed25519PublicKey, *, instance: str) -> Tokenizer:
        """Verify the folder and load it.

        Raises `SignatureInvalid`, `ManifestMismatch` (a file is missing, differs or is not listed; another
        instance), `VersionUnsupported`, `ConfigurationError` (a file that cannot be used).
        """
        manifest, _ = ClientManifest.load(folder / "manifest.json", developer)
        if manifest.instance != instance:
            raise ManifestMismatch.because("client manifest: instance", manifest.instance, instance)
        check_files(folder, manifest.files)
        files = {name: _read(folder, name, manifest) for name in (TOKENIZER, SETTINGS, TEMPLATE)}
        data, source = files[TOKENIZER], files[TEMPLATE]
        try:
            backend = None if data is None else tokenizers.Tokenizer.from_str(data.decode())
            settings: dict[str, Any] = json.loads(files[SETTINGS] or b"{}")
            template = ChatTemplate.of(settings, None if source is None else source.decode())
        except ConfigurationError:
            raise
        except Exception as error:  # noqa: BLE001  # the tokenizers library raises bare exceptions
            raise ConfigurationError(f"tokenizer files: cannot be read ({type(error).__name__})") from None
        return cls(backend, manifest, template if backend is not None else None)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of `text`; `special` adds what the model expects around a prompt (a template writes its own).

        Raises `ConfigurationError` where there is no tokenizer.
        """
        if self._backend is None:
            raise ConfigurationError("tokenizer: this instance has no tokenizer.json; give the prompt as token ids")
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; empty where there is no tokenizer."""
        return "" if self._backend is None else self._backend.decode(list(ids), skip_special_tokens=True)

    def speaks(self, id_: int) -> bool:
        """Whether `id_` has a share in an answer's text."""
        return self._backend is not None and id_ not in self.silent and bool(self._backend.id_to_token(id_))

    def detokenizer(self) -> Detokenizer:
        """A stream of ids to text, for one answer."""
        return Detokenizer(self)


class Detokenizer:
    """Ids in, text out as soon as it is settled; all pieces together are exactly `Tokenizer.decode` of all ids.

    What a token says may depend on its neighbours: bytes of one character spread over tokens, a space that is
    dropped at the start. So a short window is decoded with and without the new tokens, and the difference is the
    new text. It is held back while its end is unsettled: an incomplete character, or a run of `<0xNN>` tokens,
    which decoders turn into text only as a whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._settled: list[int] = []
        self._pending: list[int] = []

    def push(self, id_: int) -> str:
        """The text that `id_` settles, often empty."""
        if not self._tokenizer.speaks(id_):
            return ""
        self._pending.append(id_)
        if id_ in self._tokenizer.fallback_bytes:
            return ""
        text = self._difference()
        if text.endswith(REPLACEMENT):
            return ""
        self._settled, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD. Ends the stream."""
        text = self._difference() if self._pending else ""
        self._settled, self._pending = [], []
        return text

    def _difference(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._settled + self._pending)[len(decode(self._settled)) :]


def _fallback_bytes(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Ids of the tokens `<0x00>` to `<0xFF>`, where the decoder reads them as bytes (SentencePiece byte fallback)."""
    if '"ByteFallback"' not in json.dumps(json.loads(backend.to_str()).get("decoder")):
        return frozenset()
    found = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(id_ for id_ in found if id_ is not None)


def _read(folder: Path, name: str, manifest: ClientManifest) -> bytes | None:
    """The bytes of a listed file, hashed as read, or None where the manifest lists none."""
    if name not in manifest.files:
        return None
    data = (folder / name).read_bytes()
    if not hmac.compare_digest(hashlib.sha256(data).hexdigest(), manifest.files[name].sha256):
        raise ManifestMismatch.because(f"{name} sha256", "another digest", manifest.files[name].sha256)
    return data
