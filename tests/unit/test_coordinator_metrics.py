from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from layerwise.messages import Heartbeat, Role
from layerwise.server.metrics import coordinator_metrics
from tests.unit.played_cluster import PlayedCluster


def page(played: PlayedCluster) -> str:
    class Families(Collector):
        def collect(self) -> list[object]:  # type: ignore[override]
            return list(coordinator_metrics(played.role, played.now))

    registry = CollectorRegistry()
    registry.register(Families())
    return generate_latest(registry).decode()


def test_a_running_job_is_seen_per_layer_shard_and_in_all() -> None:
    played = PlayedCluster()
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-0")
    played.hold = lambda worker, lease: len(played.leases) >= 20
    played.submit()
    played.say("shard-0", Heartbeat(resident_bytes=100, sent_bytes=5, received_bytes=7))
    played.now += 2.0
    text = page(played)
    for line in (
        'layerwise_jobs{state="running"} 1.0',
        'layerwise_processes{role="shard",state="working"} 2.0',
        'layerwise_heartbeat_age_seconds{role="shard"} 2.0',
        'layerwise_wire_bytes_total{direction="received",role="shard"} 7.0',
        'layerwise_updates_total{job="toy-1"} 4.0',
        'layerwise_samples_total{job="toy-1",outcome="applied"} 40.0',
        'layerwise_train_loss{job="toy-1"} 1.0',
        'layerwise_window_microbatches{job="toy-1"} 2.0',
        'layerwise_durable_cut_version{job="toy-1"} 4.0',
        'layerwise_queue_depth_tasks{direction="backward",job="toy-1",shard="shard-1"} 2.0',
        'layerwise_activation_store_bytes{job="toy-1",shard="shard-0"} 7.0',
        'layerwise_staleness_updates_bucket{job="toy-1",layer="3",le="0.0"} 3.0',
        'layerwise_staleness_updates_sum{job="toy-1",layer="3"} 1.0',
        'layerwise_layer_version_updates{job="toy-1",layer="0"} 4.0',
        'layerwise_layer_life{job="toy-1",layer="3"} 2.0',
        'layerwise_learning_rate{job="toy-1",layer="0"} 0.5',
    ):
        assert line in text


def test_a_job_s_labels_go_with_its_run() -> None:
    played = PlayedCluster()
    played.add(Role.SHARD, "shard-0", "shard-1")
    played.add(Role.FORWARD, "forward-0")
    played.submit()
    text = page(played)
    assert 'layerwise_jobs{state="done"} 1.0' in text
    assert 'job="toy-1"' not in text
