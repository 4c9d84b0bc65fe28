"""Every metric of the system, declared once.

Names follow Prometheus' conventions (base units, `_total`, `_seconds`). Labels are bounded sets; there is no
label for a user, a session or anything that came from a prompt, and no exemplars. Buckets are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Part = Literal["client", "enclave", "gateway", "server", "keyservice"]

LATENCY_BUCKETS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Seconds. From a table lookup to a long prefill."""
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Metric:
    """One metric: its name, what it says, the parts that export it, and its labels."""

    name: str
    help: str
    parts: tuple[Part, ...]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = LATENCY_BUCKETS


SERVING: tuple[Part, ...] = ("enclave", "gateway", "server", "keyservice")

STAGE_SECONDS = Metric(
    "stip_stage_seconds",
    "Time spent in one stage (labels: see STAGES)",
    SERVING,
    ("stage",),
)
TIME_TO_FIRST_TOKEN = Metric(
    "stip_time_to_first_token_seconds", "From a turn's arrival at the enclave to its first sampled token", ("enclave",)
)
TIME_BETWEEN_TOKENS = Metric(
    "stip_time_between_tokens_seconds", "From one sampled token of a session to its next", ("enclave",)
)
ADDED_LATENCY = Metric(
    "stip_added_latency_seconds",
    "Of one token: the gap the enclave sees minus the model compute the server reports for the step",
    ("enclave",),
)
TOKENS = Metric("stip_tokens_total", "Tokens, by direction (prompt, generated)", ("enclave",), ("direction",))
ROWS = Metric(
    "stip_rows_total",
    "Rows fed, or ids fed where the server decodes alone; ids that it generates are not in it",
    ("gateway", "server"),
)
SESSIONS = Metric("stip_sessions", "Sessions open now", ("enclave", "gateway", "server"))
LINKS = Metric("stip_links", "Links open now", ("enclave", "gateway", "server"))
TASKS = Metric("stip_tasks", "Tasks of the event loop that are alive now: a leak shows here first", SERVING)
STEP_SESSIONS = Metric("stip_step_sessions", "Sessions batched in one step", ("server",), buckets=COUNT_BUCKETS)
REFUSALS = Metric("stip_refusals_total", "Refusals, by error code", SERVING, ("code",))
RELEASES = Metric(
    "stip_releases_total", "Key releases granted, by kind (bundle, grant, renewal)", ("keyservice",), ("kind",)
)
LEASE_AGE = Metric("stip_lease_age_seconds", "Age of the oldest lease in use", ("enclave", "gateway"))
CONTROL_STREAM = Metric(
    "stip_control_stream", "1 where the key service can end leases at once: its control stream is open", ("enclave",)
)
AUDIT_SEQUENCE = Metric("stip_audit_log_entries", "Entries in the audit log", ("keyservice",))
DECISIONS = Metric(
    "stip_decisions_total",
    "Decisions of the key service, by event and code (granted, or why not); folded refusals are in it, too",
    ("keyservice",),
    ("event", "code"),
)
STORE_SECONDS = Metric(
    "stip_store_seconds",
    "From the beginning of a transaction to its end, waiting for others included, by kind (read, write)",
    ("keyservice",),
    ("kind",),
)
COLLATERAL_AGE = Metric(
    "stip_collateral_age_seconds", "Age of the oldest collateral that is kept and used", ("keyservice",)
)
LEASES = Metric("stip_leases", "Leases in force: neither ended nor revoked", ("keyservice",))
REVOCATIONS = Metric("stip_revocations", "Revocations that stand", ("keyservice",))
CONTROL_STREAMS = Metric("stip_control_streams", "Watch streams open now", ("keyservice",))
RATE_LIMITED = Metric(
    "stip_rate_limited_total",
    "Requests refused by a limit of their peer, by kind (challenge, release, renewal, watch)",
    ("keyservice",),
    ("kind",),
)
POLICY_SERIAL = Metric("stip_policy_serial", "Serial of the policy in force", ("keyservice",))
POLICY_LOADS = Metric(
    "stip_policy_loads_total",
    "Times a policy was read, at start and on SIGHUP, by result (loaded, or the code of the refusal)",
    ("keyservice",),
    ("result",),
)
READY = Metric("stip_ready", "1 where a check of readiness holds, by check", SERVING, ("check",))
REPLICAS = Metric("stip_replicas", "Replicas that answer, by instance epoch being served", ("gateway",))
SIMULATION = Metric("stip_simulation", "1 where evidence is simulated: nothing is protected", SERVING)

STAGES: dict[str, tuple[Part, str]] = {
    "attest": ("enclave", "evidence for one client challenge"),
    "release": ("enclave", "challenge, quote and bundle from the key service"),
    "embed": ("enclave", "ids to keyed rows"),
    "link": ("enclave", "rows sent to reply received, minus the server's compute and queue"),
    "head": ("enclave", "hidden state to logits"),
    "sample": ("enclave", "logits to the next id"),
    "admit": ("gateway", "lease verification"),
    "forward": ("gateway", "one frame, received to handed on"),
    "queue": ("server", "rows received to step begun, gather window included"),
    "compute": ("server", "one step of the model"),
    "verify": ("keyservice", "evidence, delegation and policy of one request"),
    "seal": ("keyservice", "bundle built, sealed and signed"),
}
"""Values of `STAGE_SECONDS`' label, each with the part that measures it."""


class Telemetry:
    """The metrics of one part in a registry of its own.

    `simulated` is exported as `stip_simulation` and cannot be unset later.
    """

    def __init__(self, part: Part, *, simulated: bool) -> None:
        self.part = part
        self.simulated = simulated
        self.registry = CollectorRegistry()
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        self.gauge(SIMULATION).set(int(simulated))

    def histogram(self, metric: Metric) -> Histogram:
        made = self._made.get(metric.name) or self._make(
            metric, Histogram(metric.name, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets)
        )
        assert isinstance(made, Histogram)
        return made

    def counter(self, metric: Metric) -> Counter:
        made = self._made.get(metric.name) or self._make(
            metric, Counter(metric.name, metric.help, metric.labels, registry=self.registry)
        )
        assert isinstance(made, Counter)
        return made

    def gauge(self, metric: Metric) -> Gauge:
        made = self._made.get(metric.name) or self._make(
            metric, Gauge(metric.name, metric.help, metric.labels, registry=self.registry)
        )
        assert isinstance(made, Gauge)
        return made

    def stage(self, name: str) -> Histogram:
        """The histogram of one stage of `STAGES`. Raises `KeyError` for a name that is not in the table."""
        if STAGES[name][0] != self.part:
            raise KeyError(f"stage {name} belongs to the {STAGES[name][0]}")
        return self.histogram(STAGE_SECONDS).labels(stage=name)

    def refused(self, code: str) -> None:
        """Count one refusal."""
        self.counter(REFUSALS).labels(code=code).inc()

    def _make(self, metric: Metric, made: Counter | Gauge | Histogram) -> Counter | Gauge | Histogram:
        if self.part not in metric.parts:
            raise KeyError(f"{metric.name} is not a metric of the {self.part}")
        self._made[metric.name] = made
        return made
