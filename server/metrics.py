"""The job-wide view in Prometheus's words, read from the coordinator's role when somebody scrapes.

Labels are bounded: a job only while processes work for it, its layers and shards, roles, states. Processes that come
and go have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from layerwise.messages import Role
from layerwise.server.coordinator_role import CoordinatorRole
from layerwise.server.job_record import JobState
from layerwise.server.job_store import SqliteJobStore
from layerwise.server.memory_store import JobStore
from layerwise.server.run import Run
from layerwise.server.training import Training

STALENESS_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
ROLES = (Role.SHARD, Role.FORWARD, Role.BACKWARD)


def coordinator_metrics(role: CoordinatorRole, now: float) -> list[Metric]:
    """All families of a coordinator; ``now`` in the role's own time."""
    trained = [(run, run.training) for run in role.runs.values() if run.training is not None]
    return [
        *_cluster(role, now),
        *_jobs(trained),
        *_blocks(trained),
        *_layers(trained),
    ]


def staleness_histogram(counts: Sequence[int]) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets and the sum, from ``counts[t]``: how often the staleness was ``t`` updates."""
    cumulative = [0, *accumulate(counts)]
    total = cumulative[-1]
    buckets = [(str(float(top)), float(cumulative[min(top + 1, len(counts))])) for top in STALENESS_BUCKETS]
    return [*buckets, ("+Inf", float(total))], float(sum(value * count for value, count in enumerate(counts)))


def _cluster(role: CoordinatorRole, now: float) -> Iterable[Metric]:
    jobs = GaugeMetricFamily("layerwise_jobs", "Jobs by state.", labels=["state"])
    states = Counter(role.states())
    for state in JobState:
        jobs.add_metric([state], states[state])
    processes = GaugeMetricFamily("layerwise_processes", "Living processes.", labels=["role", "state"])
    age = GaugeMetricFamily(
        "layerwise_heartbeat_age_seconds", "Longest time since a process of the role was heard.", labels=["role"]
    )
    resident = GaugeMetricFamily(
        "layerwise_processes_resident_bytes", "Resident memory of all processes of the role.", labels=["role"]
    )
    wire = CounterMetricFamily(
        "layerwise_wire_bytes", "Bytes on links, as the processes of the role count them.", labels=["role", "direction"]
    )
    for one in ROLES:
        members = role.members.of_role(one)
        working = sum(not member.free for member in members)
        processes.add_metric([one, "working"], working)
        processes.add_metric([one, "free"], len(members) - working)
        age.add_metric([one], max((now - member.seen for member in members), default=0.0))
        resident.add_metric([one], sum(member.vitals.resident_bytes for member in members))
        sent, received = role.members.wire_bytes(one)
        wire.add_metric([one, "sent"], sent)
        wire.add_metric([one, "received"], received)
    return jobs, processes, age, resident, wire


def _jobs(trained: list[tuple[Run, Training]]) -> Iterable[Metric]:
    def gauge(name: str, documentation: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"layerwise_{name}", documentation, labels=["job"])

    updates = CounterMetricFamily("layerwise_updates", "Updates that every layer has made.", labels=["job"])
    samples = CounterMetricFamily(
        "layerwise_samples", "Unique samples applied on all layers, or dropped.", labels=["job", "outcome"]
    )
    leased = CounterMetricFamily("layerwise_samples_leased", "Unique samples leased.", labels=["job"])
    rate = gauge("samples_per_second", "Training samples a second since the run began, without evaluations.")
    train_loss = gauge("train_loss", "Exponential average of the training loss.")
    validation_loss = gauge("validation_loss", "Loss of the last evaluation.")
    window = gauge("window_microbatches", "The window of the job.")
    open_numbers = gauge("open_microbatches", "Microbatches leased or on their way.")
    promised = gauge("max_staleness_updates", "The promise that no gradient is staler than this.")
    durable = gauge("durable_cut_version", "Version of the newest durable cut.")
    resumed = CounterMetricFamily("layerwise_resumes", "How often the job was resumed.", labels=["job"])
    for run, training in trained:
        assert run.prepared is not None
        job = [run.job]
        settings = run.prepared.settings
        updates.add_metric(job, training.version)
        samples.add_metric([run.job, "applied"], training.ledger.samples_applied)
        samples.add_metric([run.job, "dropped"], training.ledger.samples_dropped)
        leased.add_metric(job, training.ledger.samples_leased)
        if training.clock.seconds:
            rate.add_metric(job, training.run_samples / training.clock.seconds)
        if training.loss.running is not None:
            train_loss.add_metric(job, training.loss.running)
        if run.record.evaluations:
            validation_loss.add_metric(job, run.record.evaluations[-1]["loss"])
        window.add_metric(job, settings.window)
        open_numbers.add_metric(job, training.ledger.num_open)
        promised.add_metric(job, settings.max_staleness)
        durable.add_metric(job, max(training.cuts.durable, default=0))
        resumed.add_metric(job, run.record.resume_count)
    return (
        updates,
        samples,
        leased,
        rate,
        train_loss,
        validation_loss,
        window,
        open_numbers,
        promised,
        durable,
        resumed,
    )


def _blocks(trained: list[tuple[Run, Training]]) -> Iterable[Metric]:
    labels = ["job", "shard"]
    depth = GaugeMetricFamily(
        "layerwise_queue_depth_tasks", "Passes that wait for a slot.", labels=[*labels, "direction"]
    )
    store = GaugeMetricFamily(
        "layerwise_activation_store_bytes", "What forward passes keep for backward passes.", labels=labels
    )
    attempts = GaugeMetricFamily("layerwise_block_open_attempts", "Attempts that hold a place.", labels=labels)
    compute = CounterMetricFamily("layerwise_compute_seconds", "Time that slots were busy.", labels=labels)
    log = CounterMetricFamily("layerwise_event_log_bytes", "Bytes written to event logs.", labels=labels)
    for run, training in trained:
        for block, report in sorted(training.reports.items()):
            where = [run.job, run.shards[block].process]
            depth.add_metric([*where, "forward"], report.forward_queue)
            depth.add_metric([*where, "backward"], report.backward_queue)
            store.add_metric(where, report.store_bytes)
            attempts.add_metric(where, report.open_attempts)
            compute.add_metric(where, report.compute_seconds)
            log.add_metric(where, report.log_bytes)
    return depth, store, attempts, compute, log


def _layers(trained: list[tuple[Run, Training]]) -> Iterable[Metric]:
    labels = ["job", "layer"]
    staleness = HistogramMetricFamily(
        "layerwise_staleness_updates",
        "Staleness of the applied gradients that led to the layer's state.",
        labels=labels,
    )
    misalignment = HistogramMetricFamily(
        "layerwise_misalignment_updates", "The backward pass's read minus the forward pass's read.", labels=labels
    )
    version = GaugeMetricFamily("layerwise_layer_version_updates", "Version of the layer.", labels=labels)
    life = GaugeMetricFamily("layerwise_layer_life", "Life of the layer.", labels=labels)
    rate = GaugeMetricFamily("layerwise_learning_rate", "Learning rate of the layer's last update.", labels=labels)
    for run, training in trained:
        for layer in training.layers():
            where = [run.job, str(layer.layer)]
            for family, counts in ((staleness, layer.staleness), (misalignment, layer.misalignment)):
                buckets, total = staleness_histogram(counts)
                family.add_metric(where, buckets, total)
            version.add_metric(where, layer.version)
            life.add_metric(where, layer.life)
            rate.add_metric(where, layer.learning_rate)
    return staleness, misalignment, version, life, rate


def job_store_metrics(store: JobStore) -> list[Metric]:
    """The family about the coordinator's own store; nothing ever waits for one in memory."""
    waiting = store.num_waiting if isinstance(store, SqliteJobStore) else 0
    return [
        GaugeMetricFamily(
            "layerwise_job_store_queue_tasks", "Writes that wait for the job store's disk.", value=waiting
        )
    ]
