"""Recordings: what the server of one instance saw of sessions, and what was said in them, in memory and as a file.

A file is safetensors: the sessions' tensors, one after another, and one metadata entry `stip.recording`, a JSON header
that says which instance it is of and how long each session is. It holds prompts in plain, for whoever scores attacks:
it is written for its owner alone, and no attack sees more of it than its row of the matrix grants.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from stip_keyservice.audit.view import Labelled, Seen, Top
from stip_protocol.documents import explain
from stip_protocol.durable import PARTIAL
from stip_protocol.errors import ConfigurationError
from stip_protocol.lease import Epoch, InstanceId
from stip_protocol.manifest import Count, Hex32, Manifest, OutputForm

TOP = 64
"""Logits of one answer under `paper` (wire/model.proto)."""
METADATA = "stip.recording"
RECORDING_VERSION = (1, 0)
FILE_LIMIT = 8 << 30
"""Bytes of the largest recording read."""
HEADER_LIMIT = 16 << 20
"""Bytes of the largest JSON header."""
SESSIONS_LIMIT = 1 << 16

User = Literal["victim", "accomplice"]
Source = Literal["recorded", "computed"]
Length = Annotated[int, Field(ge=0, le=2**31 - 1)]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Session:
    """One session of one user."""

    user: User
    source: Source
    """From a link of a running stack, or computed from the instance's parts."""
    said: Labelled
    """What the server saw, and what it was: also of a victim, whose attackers get `said.seen` alone."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
    user: User
    source: Source
    positions: Count
    answers: Length


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)
    version: tuple[int, int] = RECORDING_VERSION
    instance: InstanceId
    epoch: Epoch
    server_sha256: Hex32
    output: OutputForm
    width: Count
    vocabulary: Count
    sessions: Annotated[tuple[_Entry, ...], Field(min_length=1, max_length=SESSIONS_LIMIT)]

    @property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Safetensors dtype and shape of every tensor: N positions and M answers of all sessions."""
        positions = sum(entry.positions for entry in self.sessions)
        answers, top = sum(entry.answers for entry in self.sessions), min(TOP, self.vocabulary)
        rows = {"rows": ("F32", (positions, self.width))}
        forms: dict[OutputForm, dict[str, tuple[str, tuple[int, ...]]]] = {
            "hidden": {**rows, "hidden": ("F32", (answers, self.width))},
            "top": {
                **rows,
                "top_indices": ("I64", (answers, top)),
                "top_values": ("F32", (answers, top)),
                "top_log_sum_exp": ("F32", (answers,)),
            },
            "ids": {"permuted": ("I64", (positions,))},
        }
        common = {"ids": ("I64", (positions,)), "asked": ("I64", (answers,)), "answers": ("I64", (answers,))}
        return {**common, **forms[self.output]}


@dataclass(frozen=True)
class Recording:
    """Sessions of one instance: an attacker's traffic, and the truth about it.

    Tensors of a file, for N positions and M answers of all sessions, width d, k = min(64, V):
    `ids` [N] true ids that were fed; `asked` [M] positions, counted from the start of their session; `answers` [M] true
    ids that the user was given; and by the instance's output: `rows` [N, d] with `hidden` [M, d], or with `top_indices`
    [M, k] (permuted), `top_values` [M, k], `top_log_sum_exp` [M]; or `permuted` [N] ids alone. float32 (a narrower
    dtype of the wire widened) and int64.
    """

    instance: str
    epoch: int
    server_sha256: str
    """`server_digest` of the manifest."""
    output: OutputForm
    width: int
    vocabulary: int
    sessions: tuple[Session, ...]

    @classmethod
    def of(cls, manifest: Manifest, sessions: Sequence[Session]) -> Self:
        """A recording of the instance that `manifest` describes."""
        digest = server_digest(manifest)
        form = (manifest.output, manifest.width, manifest.vocabulary)
        return cls(manifest.instance, manifest.epoch, digest, *form, tuple(sessions))

    def of_user(self, user: User) -> list[Labelled]:
        """The sessions of victims, or of accomplices, in their order."""
        return [session.said for session in self.sessions if session.user == user]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over header and tensors, in hexadecimal: the same for the same sessions, in a file or not."""
        header, arrays = self._packed()
        found = hashlib.sha256(header.model_dump_json().encode())
        for name in sorted(arrays):
            found.update(name.encode() + b"\x00" + arrays[name].tobytes())
        return found.hexdigest()

    def write(self, path: Path) -> None:
        """Write the file whole or not at all, readable for its owner alone.

        Raises `ConfigurationError` where sessions are not of the instance's form, or the file cannot be written.
        """
        header, arrays = self._packed()
        data = save(dict(arrays), {METADATA: header.model_dump_json()})
        partial = path.with_name(path.name + PARTIAL)
        try:
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)  # it has prompts
                raise
        except FileExistsError:
            raise _refused("file", f"{partial}, which is there already", "none: remove it, and write again") from None
        except OSError as error:
            raise ConfigurationError(f"recording {path}: {error.strerror}", field="recording") from None

    @classmethod
    def read(cls, path: Path, manifest: Manifest) -> Self:
        """The recording in a file, which is one of the instance that `manifest` describes.

        Nothing is allocated for what the file announces before it is checked. Raises `ConfigurationError` for
        another instance, epoch or server part, and for a file that is not of the format.
        """
        try:
            if not path.is_file() and path.exists():  # a pipe would be waited for
                raise _refused("file", "no file", "a file that a recorder wrote")
            if (size := path.stat().st_size) > FILE_LIMIT:
                raise _refused("size", f"{size} bytes", f"at most {FILE_LIMIT}")
            with safe_open(path, "numpy") as file:
                header = _header((file.metadata() or {}).get(METADATA, ""))
                _require_instance(header, manifest)
                _require_layout(header, {name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118
                arrays = {name: file.get_tensor(name) for name in header.layout}
        except OSError as error:
            raise ConfigurationError(f"recording {path}: {error.strerror or error}", field="recording") from None
        except SafetensorError as error:
            raise _refused(
                "file", f"no safetensors ({ascii(str(error))[1:-1]})"[:200], "a file that a recorder wrote"
            ) from None
        _require_values(header, arrays)
        return cls.of(manifest, tuple(_unpacked(header, arrays)))

    def _packed(self) -> tuple[_Header, Arrays]:
        """Header and tensors, checked. Raises `ConfigurationError`."""
        said = [session.said for session in self.sessions]
        try:
            header = _Header(
                instance=self.instance,
                epoch=self.epoch,
                server_sha256=self.server_sha256,
                output=self.output,
                width=self.width,
                vocabulary=self.vocabulary,
                sessions=tuple(
                    _Entry(
                        user=each.user, source=each.source, positions=len(each.said.ids), answers=len(each.said.answers)
                    )
                    for each in self.sessions
                ),
            )
        except ValidationError as error:
            raise ConfigurationError(f"recording: {explain(error)}", field="recording") from None
        arrays = {name: _joined(header, said, name, *form) for name, form in header.layout.items()}
        _require_values(header, arrays)
        return header, arrays


def server_digest(manifest: Manifest) -> str:
    """SHA-256 over the digests of the server part's files, in the manifest's order, in hexadecimal."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest.sha256) for digest in manifest.server.values())).hexdigest()


_FIELDS: dict[str, Callable[[Labelled], NDArray[Any] | None]] = {
    "ids": lambda said: said.ids,
    "asked": lambda said: said.seen.asked,
    "answers": lambda said: said.answers,
    "rows": lambda said: said.seen.rows,
    "permuted": lambda said: said.seen.ids,
    "hidden": lambda said: said.seen.hidden,
    "top_indices": lambda said: None if said.seen.top is None else said.seen.top.indices,
    "top_values": lambda said: None if said.seen.top is None else said.seen.top.values,
    "top_log_sum_exp": lambda said: None if said.seen.top is None else said.seen.top.log_sum_exp,
}
"""Where in a session each tensor lies."""
_ANSWERS = frozenset({"asked", "answers", "hidden", "top_indices", "top_values", "top_log_sum_exp"})
"""Tensors that count answers; the others count positions."""
_DTYPES = {"F32": np.dtype(np.float32), "I64": np.dtype(np.int64)}


def _joined(header: _Header, said: Sequence[Labelled], name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """One tensor of all sessions, of that shape. Raises `ConfigurationError` naming the first session that differs."""
    lengths = [entry.answers if name in _ANSWERS else entry.positions for entry in header.sessions]
    parts = []
    for number, (each, length) in enumerate(zip(said, lengths, strict=True)):
        part = _FIELDS[name](each)
        if part is None or part.dtype != _DTYPES[dtype] or part.shape != (length, *shape[1:]):
            got = "none" if part is None else f"{part.dtype} {list(part.shape)}"
            raise _refused(f"session {number} {name}", got, f"{_DTYPES[dtype]} {[length, *shape[1:]]}")
        parts.append(part)
    return np.ascontiguousarray(np.concatenate(parts))


def _unpacked(header: _Header, arrays: Arrays) -> Iterator[Session]:
    position = answer = 0
    for entry in header.sessions:
        positions, answers = slice(position, position + entry.positions), slice(answer, answer + entry.answers)
        cut = {name: array[answers if name in _ANSWERS else positions] for name, array in arrays.items()}
        top = None
        if header.output == "top":
            top = Top(cut["top_indices"], cut["top_values"], cut["top_log_sum_exp"])
        seen = Seen(cut.get("rows"), cut.get("permuted"), cut["asked"], cut.get("hidden"), top)
        yield Session(entry.user, entry.source, Labelled(seen, cut["ids"], cut["answers"]))
        position, answer = positions.stop, answers.stop


def _header(text: str) -> _Header:
    if not text or len(text) > HEADER_LIMIT:
        raise _refused("header", f"{len(text)} characters", f"1 to {HEADER_LIMIT} under {METADATA}")
    try:
        header = _Header.model_validate_json(text)
    except ValidationError as error:
        raise ConfigurationError(f"recording: {explain(error)}", field="recording") from None
    if header.version[0] != RECORDING_VERSION[0]:
        raise _refused("version", header.version, f"major {RECORDING_VERSION[0]}")
    return header


def _require_instance(header: _Header, manifest: Manifest) -> None:
    for what, got, expected in (
        ("instance", header.instance, manifest.instance),
        ("epoch", header.epoch, manifest.epoch),
        ("server part", header.server_sha256, server_digest(manifest)),
        ("output", header.output, manifest.output),
        ("width", header.width, manifest.width),
        ("vocabulary", header.vocabulary, manifest.vocabulary),
    ):
        if got != expected:
            raise _refused(what, got, expected)


def _require_layout(header: _Header, slices: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` unless the file has exactly the tensors that its header implies."""
    layout = header.layout
    if slices.keys() != layout.keys():
        raise _refused("tensors", sorted(ascii(name)[:40] for name in slices)[:12], sorted(layout))
    for name, (dtype, shape) in layout.items():
        got = (slices[name].get_dtype(), tuple(slices[name].get_shape()))
        if got != (dtype, shape):
            raise _refused(name, f"{got[0]} {list(got[1])}", f"{dtype} {list(shape)}")


def _require_values(header: _Header, arrays: Arrays) -> None:
    """Raise `ConfigurationError` for what no server sees: ids beyond the vocabulary, infinite values, no order."""
    for name, array in arrays.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise _refused(name, "values that are not finite", "finite ones")
    for name in ("ids", "answers", "permuted", "top_indices"):
        if name in arrays and not ((arrays[name] >= 0) & (arrays[name] < header.vocabulary)).all():
            raise _refused(name, "ids beyond the vocabulary", f"0 to {header.vocabulary - 1}")
    if "top_values" in arrays and (np.diff(arrays["top_values"], axis=1) > 0).any():
        raise _refused("top_values", "another order", "the largest first")
    answer = 0
    for number, entry in enumerate(header.sessions):
        asked = arrays["asked"][answer : answer + entry.answers]
        if (np.diff(asked) <= 0).any() or (asked < 0).any() or (asked >= entry.positions).any():
            allowed = f"rising positions below {entry.positions}"
            raise _refused(f"session {number} asked", "other positions", allowed)
        answer += entry.answers


def _refused(what: str, got: object, allowed: object) -> ConfigurationError:
    return ConfigurationError.because(f"recording, {what}", got, allowed)
