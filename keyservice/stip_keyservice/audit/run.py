"""One instance's whole audit: what was said, what attackers hold, what they find, as one report.

The same instance, model, traffic, seed and versions give the same report. Everything that is made on the way (the
attacker's own model, a second instance) lies in a temporary folder, which holds no key in plain.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from stip_keyservice.audit import corpus, sibling, surrogate, traffic, truth
from stip_keyservice.audit.attacks import MODULES, Attack, attack
from stip_keyservice.audit.document import Cell, Correlation, Report, Subject, Traffic
from stip_keyservice.audit.knowledge import KNOWLEDGE
from stip_keyservice.audit.material import Material, Twin
from stip_keyservice.audit.matrix import cells, views
from stip_keyservice.audit.metrics import correlation
from stip_keyservice.audit.network import Network
from stip_keyservice.audit.priors import answered
from stip_keyservice.audit.recording import Recording, User, server_digest
from stip_keyservice.audit.scoring import Judge
from stip_keyservice.audit.truth import Truth
from stip_keyservice.audit.view import Ids
from stip_keyservice.audit.words import spelled
from stip_keyservice.home import Home
from stip_keyservice.protect.equivalence.opening import OpenedInstance, open_instance
from stip_keyservice.protect.storage.checkpoint import Checkpoint
from stip_protocol.errors import ConfigurationError

THREADS = 1
"""Of torch: another number adds in another order, which can move the last digits. Small models gain little from more;
audits of several instances run side by side."""
PACKAGES = ("torch", "transformers", "numpy", "stip")
MATRICES = 16
"""Of one server part, held against their plain forms for the distance correlations."""
PREPARING = ("instance", "traffic", "public text", "surrogate", "sibling")
SIBLING_SHARE = 4
"""The user of another instance sends one of so many public texts: enough to link two."""

Progress = Callable[[str, int, int], None]
"""(what is done next, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""


@dataclass(frozen=True)
class Audit:
    """What is to be audited, and with what."""

    instance: Path
    model: Path
    """The checkpoint folder that the instance was made from."""
    base: Path | None = None
    """The public checkpoint that the model derives from, which may be `model` itself."""
    recording: Path | None = None
    """Traffic of a real run; None: computed from the instance's parts."""
    text: Path | None = None
    """What is said, as a UTF-8 file; None: the model's own text."""
    sibling: Path | None = None
    """Another instance of the same model; None: one is made for the audit."""
    attacks: Sequence[str] = tuple(MODULES)
    """Letters."""
    knowledge: Sequence[str] = tuple(KNOWLEDGE)
    """Rows of the matrix."""
    seed: int = 0
    scale: str = "default"
    """Of `corpus.SCALES`."""
    origin: str = ""
    """What the model is, in words, for readers."""

    @property
    def whole(self) -> bool:
        """Whether nothing is lacking. Only a whole audit says what does not leak."""
        return not self.lacking

    @property
    def lacking(self) -> str:
        """Why this is no whole audit, for people; empty where it is one."""
        if set(self.attacks) != set(MODULES) or set(self.knowledge) != set(KNOWLEDGE):
            return "it is of some attacks or knowledge alone"
        return "--scale quick, which gives attackers too little" if self.scale == "quick" else ""

    def run(self, home: Home, progress: Progress = silent) -> Report:
        """Run it. Raises `ConfigurationError` for input that is refused, `IntegrityError` where the instance is not
        what was signed; what an attack raises is a fault, and is raised on."""
        attacks, steps = [attack(letter) for letter in self.attacks], itertools.count()
        total = len(PREPARING) + len(attacks) * len(self.knowledge)
        with _threads(), tempfile.TemporaryDirectory(prefix="stip-audit-") as folder:

            def advance(what: str) -> None:
                progress(what, next(steps), total)

            advance(PREPARING[0])
            opened = open_instance(self.instance, self.model, home)
            material, recording = self._material(opened, Path(folder), home, advance)
            found = tuple(self._cells(material, attacks, advance))
            progress("", total, total)
            return Report(
                subject=_subject(opened, material.truth, self.origin),
                traffic=_traffic(recording),
                seed=self.seed,
                versions={name: version(name) for name in PACKAGES},
                cells=found,
                correlations=tuple(_correlations(material.truth, self.seed)),
            )

    def _material(
        self, opened: OpenedInstance, folder: Path, home: Home, advance: Callable[[str], None]
    ) -> tuple[Material, Recording]:
        known, base = truth.of(opened), self._base()
        scale = corpus.SCALES[self.scale].within(opened.manifest.max_positions)
        texts = (
            corpus.sampled(known.plain, scale, self.seed)
            if self.text is None
            else corpus.cut(self.text, known.plain, scale, self.seed)
        )
        advance(PREPARING[1])
        recording = self._recording(known, texts, scale)
        advance(PREPARING[2])
        public, held_out = texts("public"), texts("held_out")
        advance(PREPARING[3])
        own = surrogate.train(
            public,
            folder / "surrogate",
            width=opened.manifest.width,
            vocabulary=opened.manifest.vocabulary,
            positions=opened.manifest.max_positions,
            passes=scale.passes,
            seed=self.seed,
        )
        advance(PREPARING[4])
        material = Material(
            truth=known,
            victims=recording.of_user("victim"),
            public_text=public,
            held_out=held_out,
            surrogate=own,
            seed=self.seed,
            words=spelled(self.model),
            accomplice=recording.of_user("accomplice"),
            base=base,
            twin=self._twin(opened, public, scale, folder, home) if "sibling" in self.knowledge else None,
        )
        return material, recording

    def _twin(
        self, opened: OpenedInstance, public: Sequence[Ids], scale: corpus.Scale, folder: Path, home: Home
    ) -> Twin:
        if self.sibling is None:
            other = truth.of(sibling.make(opened, folder / "sibling"))
        else:
            other = truth.read(self.sibling, self.model, home)
        if other.manifest.instance == opened.manifest.instance:
            raise ConfigurationError.because("sibling", "the audited instance", "another instance of the same model")
        if other.manifest.preset != opened.manifest.preset:
            got, allowed = other.manifest.preset, f"{opened.manifest.preset}, as the audited instance"
            raise ConfigurationError.because("sibling preset", got, allowed)
        return Twin(other, traffic.observed(other, public[::SIBLING_SHARE], scale.prompt))

    def _base(self) -> Network | None:
        if self.base is None:
            return None
        return Network(Checkpoint.open(self.base).directory)

    def _recording(self, known: Truth, texts: corpus.Source, scale: corpus.Scale) -> Recording:
        if self.recording is None:
            said: dict[User, list[Ids]] = {"victim": texts("victims"), "accomplice": texts("accomplice")}
            return traffic.computed(known, said, scale.prompt)
        recording = Recording.read(self.recording, known.manifest)
        victims = recording.of_user("victim")
        if not victims:
            raise ConfigurationError.because("recording, sessions", "none of a victim", "at least one")
        # a cell without a figure satisfies a policy: what is not applicable for lack of traffic is no finding
        if not any(len(answered(victim)) for victim in victims):
            raise ConfigurationError.because("recording, victims' answers", "none that was fed", "at least one")
        if "accomplice" in self.knowledge and not recording.of_user("accomplice"):
            allowed = "at least one, or knowledge without accomplice"
            raise ConfigurationError.because("recording, sessions", "none of an accomplice", allowed)
        return recording

    def _cells(self, material: Material, attacks: Sequence[Attack], advance: Callable[[str], None]) -> Iterator[Cell]:
        """Row by row: what one attacker holds and keeps is gone before the next one begins."""
        judge = Judge(material)
        for row in self.knowledge:
            yield from cells(views(material, [row]), attacks, judge, lambda letter, row: advance(f"{letter}, {row}"))
            gc.collect()


def _subject(opened: OpenedInstance, known: Truth, origin: str) -> Subject:
    manifest = opened.manifest
    return Subject(
        instance=manifest.instance,
        epoch=manifest.epoch,
        preset=manifest.preset,
        dtype=manifest.dtype,
        width=manifest.width,
        vocabulary=manifest.vocabulary,
        layers=known.server.model.config.num_hidden_layers,
        tied=bool(opened.planned.architecture.tied),
        origin=origin,
        server_sha256=server_digest(manifest),
    )


def _traffic(recording: Recording) -> Traffic:
    victims, helping = recording.of_user("victim"), recording.of_user("accomplice")
    computed = [session for session in recording.sessions if session.source == "computed"]
    return Traffic(
        source="computed" if any(session.user == "victim" for session in computed) else "recorded",
        sha256=recording.digest,
        sessions=len(victims),
        positions=sum(len(each.ids) for each in victims),
        accomplice_tokens=sum(len(each.ids) for each in helping),
        accomplice_computed=sum(len(session.said.ids) for session in computed if session.user == "accomplice"),
    )


def _correlations(known: Truth, seed: int) -> Iterator[Correlation]:
    """Of the embedding's rows, and of the server part's matrices that read the residual, before and after the key."""
    generator = np.random.default_rng([seed, *b"correlations"])
    yield correlation("rows", known.entry.rows, known.keyed.rows, generator)
    plain, width = known.plain.tensors, known.manifest.width
    matrices = [(name, keyed) for name, keyed in known.server.tensors.items() if keyed.shape[1:] == (width,)]
    tables = {known.entry.rows.shape[0], 1}
    pairs = [
        (plain[found], keyed)
        for name, keyed in sorted(matrices)
        if len(keyed) not in tables and (found := _namesake(name, plain)) and plain[found].shape == keyed.shape
    ][:MATRICES]
    if pairs:
        before, after = (np.concatenate(each) for each in zip(*pairs, strict=True))
        yield correlation("weights", before, after, generator)


def _namesake(name: str, plain: Collection[str]) -> str | None:
    """The source's tensor of that name, with or without a prefix: a server part may lack its head, and with it one."""
    return next((found for found in sorted(plain) if found == name or found.endswith(f".{name}")), None)


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
