"""What every process that has links serves about them at ``/metrics``."""

from __future__ import annotations

from typing import Any

from layerwise.transport import Transport


def transport_metrics(transport: Transport) -> list[Any]:
    """Prometheus families: what was refused, and what is held for peers. Event loop's thread only."""
    from prometheus_client.core import GaugeMetricFamily

    outbox = sum(transport.outbox_bytes(peer) for peer in transport.peers)
    return [
        *transport.refusals.collect(),
        GaugeMetricFamily("layerwise_outbox_bytes", "What waits for peers to take what was sent before.", value=outbox),
        GaugeMetricFamily(
            "layerwise_idle_buffers_bytes", "Receive buffers kept for reuse.", value=transport.pool.idle_bytes
        ),
    ]
