"""Counters and histograms in prometheus_client's default registry, which vLLM and most servers expose.

Nothing is counted where prometheus_client is not installed (extra ``metrics``).
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from csulora.errors import InputError

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)
_UNDO = (-0.1, 0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)
_RATIOS = (1e-6, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


@dataclass(frozen=True)
class Metrics:
    """What every route counts; a counter's name ends in ``_total`` where it is scraped."""

    decisions: Any
    seconds: Any
    undo: Any
    total_undo: Any
    annihilation: Any
    change: Any
    uncorrected: Any


@dataclass(frozen=True)
class GuardMetrics:
    """What the directory guard counts besides. Elsewhere a scan that never was would look like one long ago."""

    undecided: Any
    scanned: Any
    reloads: Any


_lock = threading.Lock()


def found() -> Metrics | None:
    """Return the metrics, made when they are first asked for; None without prometheus_client."""
    with _lock:
        return _metrics()


def of_guard() -> GuardMetrics | None:
    """Return the guard's metrics, likewise."""
    with _lock:
        return _guard_metrics()


@cache
def _prometheus() -> Any:
    try:
        return importlib.import_module("prometheus_client")
    except ImportError:
        return None


@cache
def _metrics() -> Metrics | None:
    prometheus, labels = _prometheus(), ["verdict", "reason", "route"]
    if prometheus is None:
        return None
    counter, histogram = prometheus.Counter, prometheus.Histogram
    return Metrics(
        counter("csulora_decisions", "Adapters decided on", labels),
        histogram("csulora_decision_seconds", "From opening an adapter to the verdict", labels, buckets=_SECONDS),
        histogram("csulora_largest_undo", "Of one module of an adapter", ["when", "route"], buckets=_UNDO),
        histogram("csulora_total_undo", "Of all modules of an adapter", ["when", "route"], buckets=_UNDO),
        histogram("csulora_annihilation_ratio", "Smallest of a module", ["when", "route"], buckets=_RATIOS),
        histogram("csulora_relative_change", "Of a corrected adapter", ["route"], buckets=_SHARES),
        histogram("csulora_uncorrected_share", "Of |dW|^2 of a corrected adapter", ["route"], buckets=_SHARES),
    )


@cache
def _guard_metrics() -> GuardMetrics | None:
    prometheus = _prometheus()
    if prometheus is None:
        return None
    counter, gauge = prometheus.Counter, prometheus.Gauge
    return GuardMetrics(
        gauge("csulora_guard_undecided", "Uploads that wait for a decision"),
        gauge("csulora_guard_scan_timestamp_seconds", "End of the last scan"),
        counter("csulora_guard_reloads", "Policy and subspace file read again (SIGHUP)", ["result"]),
    )


def observe(decision: Mapping[str, Any]) -> None:
    """Count a decision, given as its line of the log."""
    metrics = found()
    if metrics is None:
        return
    route, totals = decision["route"], decision["totals"]
    labels = {"verdict": decision["verdict"], "reason": decision["reason_code"] or "", "route": route}
    metrics.decisions.labels(**labels).inc()
    metrics.seconds.labels(**labels).observe(decision["seconds"])
    if totals is None:
        return
    is_served = decision["verdict"] == "corrected"
    for when, suffix in (("before", ""), ("after", "_after")) if is_served else (("before", ""),):
        metrics.undo.labels(when=when, route=route).observe(totals[f"largest_undo{suffix}"])
        metrics.total_undo.labels(when=when, route=route).observe(totals[f"undo{suffix}"])
        if (ratio := totals[f"annihilation_ratio{suffix}"]) is not None:
            metrics.annihilation.labels(when=when, route=route).observe(ratio)
    if is_served:
        metrics.change.labels(route=route).observe(totals["relative_change"])
        metrics.uncorrected.labels(route=route).observe(totals["uncorrected"])


def serve(address: str) -> None:
    """Expose the metrics over HTTP at ``[HOST:]PORT``; without a host to this machine alone.

    Raises:
        InputError: prometheus_client is not installed, or nothing can listen there.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise InputError(f"{address}: is no [HOST:]PORT such as 9464 or 0.0.0.0:9464")
    if found() is None:
        raise InputError("prometheus_client is not installed; pip install 'csulora[metrics]'")
    try:
        importlib.import_module("prometheus_client").start_http_server(int(port), host or "127.0.0.1")
    except (OSError, OverflowError) as error:
        raise InputError(f"{address}: metrics cannot be served there: {error}") from error
