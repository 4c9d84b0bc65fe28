"""Latency by stage, read from the `/metrics` of running parts."""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from stip_protocol import telemetry
from stip_protocol.telemetry import STAGES, Metric

TOKEN_METRICS = (telemetry.TIME_TO_FIRST_TOKEN, telemetry.TIME_BETWEEN_TOKENS, telemetry.ADDED_LATENCY)


@dataclass(frozen=True)
class Row:
    """One histogram. `p50` and `p95` are the upper bounds of the buckets that hold those quantiles; all in seconds."""

    part: str
    name: str
    help: str
    count: int
    mean: float
    p50: float
    p95: float


def scrape(address: str) -> str:
    """The text of one part's metrics."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def gauge(address: str, metric: Metric) -> float:
    """The value of one part's metric without labels. Raises `KeyError` where the part does not export it."""
    for family in text_string_to_metric_families(scrape(address)):
        for sample in family.samples:
            if sample.name == metric.name:
                return sample.value
    raise KeyError(metric.name)


def table(addresses: Mapping[str, str]) -> list[Row]:
    """Stages of all parts, then the token metrics; only what has been observed. `addresses` is part: host:port."""
    rows = []
    texts = {part: scrape(address) for part, address in addresses.items()}
    for stage, (part, help_text) in STAGES.items():
        if part in texts:
            rows.append(_row(texts[part], part, stage, help_text, telemetry.STAGE_SECONDS, {"stage": stage}))
    if "enclave" in texts:
        rows.extend(_row(texts["enclave"], "enclave", each.name, each.help, each, {}) for each in TOKEN_METRICS)
    return [row for row in rows if row is not None]


def _row(text: str, part: str, name: str, help_text: str, metric: Metric, labels: Mapping[str, str]) -> Row | None:
    buckets: list[tuple[float, float]] = []
    count = total = 0.0
    for family in text_string_to_metric_families(text):
        if family.name != metric.name:
            continue
        for sample in family.samples:
            if any(sample.labels.get(key) != value for key, value in labels.items()):
                continue
            if sample.name.endswith("_bucket"):
                buckets.append((float(sample.labels["le"]), sample.value))
            elif sample.name.endswith("_count"):
                count = sample.value
            elif sample.name.endswith("_sum"):
                total = sample.value
    if not count:
        return None
    return Row(part, name, help_text, int(count), total / count, _bound(buckets, 0.5), _bound(buckets, 0.95))


def _bound(buckets: list[tuple[float, float]], quantile: float) -> float:
    wanted = quantile * max(value for _, value in buckets)
    return next((le for le, value in sorted(buckets) if value >= wanted), math.inf)
