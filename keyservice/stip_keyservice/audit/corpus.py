"""What victims, helpers and the public say: texts as true ids.

Sampled from the plain model itself at temperature 1. Prior knowledge is then exactly the model's, so that "what one
would guess anyway" is as strong as it can be. Or cut from a text that somebody brings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from tokenizers import Tokenizer

from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import Ids
from stip_keyservice.audit.words import TOKENIZER
from stip_protocol.errors import ConfigurationError

BATCH, LARGE_BATCH = 64, 256
"""Texts sampled at once. What is drawn depends on it."""
TEXT_LIMIT = 64 << 20
"""Bytes of the largest text file read."""

Part = Literal["victims", "accomplice", "public", "held_out"]
Source = Callable[[Part], list[Ids]]
"""Gives the texts of each part; none of them has a text of another."""


@dataclass(frozen=True)
class Scale:
    """How much is said."""

    length: int
    """Positions of a session: what is fed of one text, which has one id more."""
    prompt: int
    """How many of them are sent; the others were answered."""
    victims: int
    """Sessions."""
    accomplice: int
    """Tokens, rounded up to whole sessions."""
    public: int
    """Tokens."""
    held_out: int
    """Tokens that no attacker sees, by which stolen models are judged."""
    passes: int
    """How often the attacker's own model sees the public text as it learns."""

    def sessions(self, part: Part) -> int:
        """Texts of one part."""
        tokens = {"accomplice": self.accomplice, "public": self.public, "held_out": self.held_out}
        return self.victims if part == "victims" else -(-tokens[part] // self.length)

    def within(self, positions: int) -> Scale:
        """This scale with sessions no longer than a model's positions. Raises `ConfigurationError` below four."""
        if positions < 4:
            raise ConfigurationError.because("model positions", positions, "at least 4, for a prompt and its answer")
        length = min(self.length, positions)
        return Scale(**{**self.__dict__, "length": length, "prompt": min(self.prompt, length // 2)})


SCALES = {
    "quick": Scale(length=32, prompt=16, victims=6, accomplice=1600, public=3200, held_out=640, passes=2),
    "default": Scale(length=96, prompt=48, victims=24, accomplice=64_000, public=64_000, held_out=6000, passes=4),
}
"""By name. `quick` shows that everything runs; its figures say little."""


def sampled(plain: Network, scale: Scale, seed: int) -> Source:
    """Texts of the plain model, of each part by a seed of its own."""

    def texts(part: Part) -> list[Ids]:
        drawn = int.from_bytes(hashlib.sha256(f"{part}/{seed}".encode()).digest()[:8], "big") >> 1
        length = scale.length + 1
        return sample(plain, sessions=scale.sessions(part), length=length, seed=drawn, batch=LARGE_BATCH)

    return texts


def cut(path: Path, plain: Network, scale: Scale, seed: int) -> Source:
    """Pieces of a UTF-8 file by the tokenizer in the model's folder, in a seeded order, each begun as the model begins.

    Raises `ConfigurationError` where the file cannot be read or is too short, or the model has no tokenizer.
    """
    ids = _encoded(path, plain)
    begin = plain.config.get("bos_token_id")
    start = [] if not isinstance(begin, int) else [begin]
    size = scale.length + 1 - len(start)
    pieces = ids[: len(ids) // size * size].reshape(-1, size)
    needed = {part: scale.sessions(part) for part in get_args(Part)}
    if len(pieces) < sum(needed.values()):
        allowed = f"at least {sum(needed.values()) * size} at this scale"
        raise ConfigurationError.because(f"text {path}", f"{len(ids)} tokens", allowed)
    order = np.random.default_rng([seed, *b"text"]).permutation(len(pieces))
    places = dict(zip(needed, np.split(order, np.cumsum(list(needed.values())))[:-1], strict=True))

    def texts(part: Part) -> list[Ids]:
        return [np.concatenate([np.array(start, np.int64), pieces[place]]) for place in places[part]]

    return texts


def _encoded(path: Path, plain: Network) -> Ids:
    """[n] true ids of a text file."""
    try:
        with path.open("rb") as file:
            data = file.read(TEXT_LIMIT + 1)
        if len(data) > TEXT_LIMIT:
            raise ConfigurationError.because(f"text {path}", "a larger file", f"at most {TEXT_LIMIT} bytes")
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigurationError(f"text {path}: {reason}", field="text") from None
    tokenizer = plain.folder / TOKENIZER
    if not tokenizer.is_file():
        raise ConfigurationError.because("model", f"no {TOKENIZER}", "a tokenizer, for a text of your own")
    found = Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids
    return np.array(found, np.int64)


def sample(plain: Network, *, sessions: int, length: int, seed: int, batch: int = BATCH) -> list[Ids]:
    """So many texts of `length` ids [length], each from the model's first id on (or a random one where it has none)."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[Ids] = []
    for first in range(0, sessions, batch):
        texts += _batch(plain, min(batch, sessions - first), length, generator)
    return texts


@torch.inference_mode()
def _batch(plain: Network, count: int, length: int, generator: torch.Generator) -> list[Ids]:
    begin, vocabulary = plain.config.get("bos_token_id"), plain.config["vocab_size"]
    if isinstance(begin, int):
        ids = torch.full((count, 1), begin)
    else:
        ids = torch.randint(vocabulary, (count, 1), generator=generator)
    cache, columns = None, [ids]
    while len(columns) < length:
        result = plain.model(input_ids=columns[-1], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        shares = torch.softmax(result.logits[:, -1].double(), dim=-1)
        columns.append(torch.multinomial(shares, 1, generator=generator))
    return list(torch.cat(columns, dim=1).numpy().astype(np.int64))
