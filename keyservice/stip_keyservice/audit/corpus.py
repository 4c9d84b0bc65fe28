"""What victims, helpers and the public say: texts as true ids.

Sampled from the plain model itself at temperature 1. Prior knowledge is then exactly the model's, so that "what one
would guess anyway" is as strong as it can be.
"""

from __future__ import annotations

import numpy as np
import torch

from stip_keyservice.audit.network import Network
from stip_keyservice.audit.view import Ids

BATCH = 64


def sample(plain: Network, *, sessions: int, length: int, seed: int) -> list[Ids]:
    """So many texts of `length` ids [length], each from the model's first id on (or a random one where it has none)."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[Ids] = []
    for first in range(0, sessions, BATCH):
        texts += _batch(plain, min(BATCH, sessions - first), length, generator)
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
