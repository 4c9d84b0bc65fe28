"""A user's client in a process of its own: one answer, a line of JSON a token. Arguments: profile, ids, tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import stip

profile, ids, tokens = sys.argv[1:]
with stip.connect(Path(profile)) as connection, connection.session() as session:
    for chunk in session.generate(json.loads(ids), max_tokens=int(tokens), temperature=0.0):
        print(json.dumps(chunk.id), flush=True)
    print(json.dumps({"finish": session.last.finish_reason.name if session.last else None}), flush=True)
