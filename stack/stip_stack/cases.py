"""What `make audit` audits: the bundled model and one derived from it, under presets, with traffic of a real run.

Everything that is drawn afresh (keys, the traffic of a running stack) is kept in one folder and used again, so that an
audit can be repeated:

    OUT/
      home/                 the key service's home: signs the instances, opens their secrets
      derived/              a checkpoint tuned from the bundled model, and drift.json: how far it went
      instances/<case>/
      recordings/           <case>-<scale>-<seed>.safetensors
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from stip_keyservice.audit import truth
from stip_keyservice.audit.corpus import SCALES, Part, Scale, sampled
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.recording import Recording, Session, User
from stip_keyservice.audit.traffic import observed
from stip_keyservice.audit.view import Ids
from stip_keyservice.home import Home
from stip_protocol.errors import ConfigurationError
from stip_protocol.manifest import Preset
from stip_stack.derived import DRIFT, Drift, derive
from stip_stack.processes import run_side_by_side
from stip_stack.said import Said, converse, recorded
from stip_stack.stack import BIN, Stack
from stip_stack.trials import Job
from stip_stack.workspace import Published

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "stack" / "demo_model"
SPOKEN = {"quick": 6, "default": 72}
"""Sessions of the accomplice that are really held, by scale. What the others would show is computed: tens of thousands
of tokens take minutes to decode, and a server sees nothing else of them."""
SEEDS: dict[User, int] = {"victim": 0, "accomplice": 1 << 32}
"""Where the seeds begin under which users' answers are sampled."""
BUDGET = 10**7
STACK = ".stack-"
"""How the folder begins in which a stack runs, for as long as it does. It has a copy of the home's keys."""
MARK = ".stip-audit"
"""An empty file in a folder that audits may write to, and remove things from."""

Model = Literal["bundled", "derived"]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One instance to be audited."""

    name: str
    model: Model
    preset: Preset


CASES = {
    case.name: case
    for case in (
        Case("paper", "bundled", "paper"),
        Case("hardened", "bundled", "hardened"),
        Case("throughput", "bundled", "throughput"),
        Case("derived-paper", "derived", "paper"),
        Case("derived-hardened", "derived", "hardened"),
    )
}


def documents() -> list[Path]:
    """Prose of another kind than the bundled model's: this repository's own."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/decisions").glob("*.md"))]


@dataclass(frozen=True)
class Place:
    """The folder that everything is kept in."""

    out: Path
    scale: str
    """Of `corpus.SCALES`."""
    seed: int
    workers: int
    """Processes at once."""

    @cached_property
    def home(self) -> Home:
        return Home.open(self.out / "home")

    def instance(self, case: Case) -> Path:
        return self.out / "instances" / case.name

    def recording(self, case: Case) -> Path:
        return self.out / "recordings" / f"{case.name}-{self.scale}-{self.seed}.safetensors"

    def model(self, model: Model) -> Path:
        return {"bundled": BUNDLED, "derived": self.out / "derived"}[model]

    def base(self, case: Case) -> Path | None:
        """The public model that a case's derives from. The bundled one counts as private."""
        return BUNDLED if case.model == "derived" else None

    def origin(self, case: Case) -> str:
        """In words, for readers of the report."""
        if case.model == "bundled":
            return "bundled model"
        moved = Drift(**json.loads((self.model("derived") / DRIFT).read_text()))
        return f"a fine-tune of the bundled model, which is public here; its weights moved by {moved.whole:.1%}"

    def claim(self) -> None:
        """Make the folder. Raises `ConfigurationError` for one that holds something else than earlier audits."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not (self.out / MARK).exists() and any(self.out.iterdir()):
                raise ConfigurationError.because("out", f"{self.out}, not empty", "a new folder, or an earlier audit's")
            (self.out / MARK).touch()
        except OSError as error:
            raise ConfigurationError(f"out {self.out}: {error.strerror}") from None

    # -- made where it is not there -----------------------------------------------------------------------------------

    def derive(self, tell: Tell) -> None:
        """The derived model."""
        if self.model("derived").exists():
            return
        drift = derive(BUNDLED, documents(), self.model("derived"))
        tell(
            f"derived a model: weights moved by {drift.whole:.1%} (the farthest matrix by {drift.largest:.1%}), "
            f"loss on its text {drift.loss_before:.2f} -> {drift.loss_after:.2f} nats a token"
        )

    def protect(self, cases: Iterable[Case], tell: Tell) -> None:
        """The instances, by the real command."""
        commands = {}
        for case in cases:
            folder = self.instance(case)
            if not (folder / "manifest.json").exists():
                folder.parent.mkdir(exist_ok=True)
                commands[case.name] = [
                    str(BIN / "stip-keyservice"), "protect", str(self.model(case.model)), "--preset", case.preset,
                    "--out", str(folder), "--home", str(self.home.path), "--workers", "1", "--quiet",
                    *(["--accept-token-cipher"] if case.preset == "throughput" else []),
                ]  # fmt: skip
        run_side_by_side(
            commands, at_once=self.workers, ended=lambda name, took: tell(f"protected {name} ({took:.0f} s)")
        )

    def record(self, cases: Iterable[Case], tell: Tell) -> None:
        """The recordings: a running stack of all instances that lack one, their victims and their accomplice."""
        wanted = [case for case in cases if not self.recording(case).exists()]
        if not wanted:
            return
        self.recording(wanted[0]).parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=STACK, dir=self.out) as folder:
            work = Path(folder) / "work"
            # The stack's key service registers users and instances; this home stays as it is.
            shutil.copytree(self.home.path, work / "home")
            with Stack(work, environment={"OMP_NUM_THREADS": "1"}) as stack:
                self._run(stack, wanted, tell)

    def _run(self, stack: Stack, cases: Sequence[Case], tell: Tell) -> None:
        published = [stack.workspace.published(self.instance(case)) for case in cases]
        servers = [f"server-{number}-0" for number in range(len(cases))]
        stack.start(published, engine={"threads": 1, "slots": 32}, recorded=servers)
        for user in SEEDS:
            stack.enrol(user, published[0], *published[1:], budget=BUDGET)
        tell(f"{len(stack.processes)} processes run; before every model server stands a recorder")
        texts: dict[Model, dict[Part, list[Ids]]] = {}
        for case, server, each in zip(cases, servers, published, strict=True):
            scale = SCALES[self.scale].within(each.manifest.max_positions)
            if case.model not in texts:
                source = sampled(Network(self.model(case.model)), scale, self.seed)
                texts[case.model] = {part: source(part) for part in ("victims", "accomplice")}
            said = asyncio.run(self._talk(stack, each, scale, texts[case.model]))
            real = recorded(said, [stack.tape(server)], each.manifest)
            rest = self._computed(case, texts[case.model]["accomplice"][SPOKEN[self.scale] :], scale)
            Recording.of(each.manifest, [*real.sessions, *rest]).write(self.recording(case))
            positions = sum(len(session.said.ids) for session in real.sessions)
            tell(f"recorded {case.name}: {len(said)} sessions, {positions} positions; {len(rest)} more were computed")

    async def _talk(self, stack: Stack, published: Published, scale: Scale, texts: dict[Part, list[Ids]]) -> list[Said]:
        """Victims and accomplice, all at once: each sends the beginnings of texts, and the model goes on."""
        parts: dict[User, list[Ids]] = {
            "victim": texts["victims"], "accomplice": texts["accomplice"][: SPOKEN[self.scale]]
        }  # fmt: skip
        said = await asyncio.gather(*(
            converse(
                stack.profile(user, published, name=f"profile-{user}-{published.manifest.instance}"),
                user,
                [
                    Job(
                        text[: scale.prompt].tolist(),
                        max_tokens=scale.length + 1 - scale.prompt,
                        temperature=1.0,
                        seed=(self.seed << 33) % (1 << 63) + SEEDS[user] + number,
                    )
                    for number, text in enumerate(each)
                ],
            )
            for user, each in parts.items()
        ))  # fmt: skip
        return [one for each in said for one in each]

    def _computed(self, case: Case, texts: Sequence[Ids], scale: Scale) -> list[Session]:
        """What the server would see of the accomplice's other texts."""
        known = truth.read(self.instance(case), self.model(case.model), self.home)
        return [Session("accomplice", "computed", said) for said in observed(known, texts, scale.prompt)]
