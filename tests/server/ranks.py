"""What torchrun starts for test_parallel: greedy ids of checkpoints that are cut among the ranks.

    torchrun ... tests/server/ranks.py REQUEST ANSWER

REQUEST is JSON: {name: {"folder", "form", "prompts", "count", "chunk"}}; ANSWER gets {name: ids of each prompt}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.distributed.configuration_utils import DistributedConfig

from stip_server.config import TransformersSettings
from stip_server.engine import Form
from stip_server.engines.transformers import card_for, parallel, split
from stip_server.engines.transformers.parallel import LeadingRunner, Ranks, follow
from stip_server.engines.transformers.sharding import own_kv_heads
from tests.server.stepping import Stepper, table_of


def main(request: Path, answer: Path) -> None:
    torch.set_num_threads(1)
    parallel.FRAME = 512  # So that some steps take one broadcast to announce, and some two.
    settings = TransformersSettings(tensor_parallel=2, slots=4)
    ranks = Ranks.join(settings)
    assert ranks is not None
    answers: dict[str, Any] = {}
    for name, job in json.loads(request.read_text()).items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job["folder"], distributed_config=DistributedConfig(tp_size=2), dtype=torch.float32
        )
        base, head = split(model)
        card = card_for(base, head, settings)
        if ranks.rank > 0:
            follow(base, head, card, ranks)
            continue
        runner = LeadingRunner(base, head, card, ranks)
        stepper = Stepper(runner, table_of(model))
        ids = stepper.greedy(job["prompts"], job["count"], Form(job["form"]), model, job["chunk"])
        kept = runner._cache.layers[0].keys.shape[1]
        assert kept == own_kv_heads(base, runner._shape)
        answers[name] = {"ids": ids, "kv_heads": kept}
        ranks.announce(b"")
    if ranks.rank == 0:
        answer.write_text(json.dumps(answers))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
