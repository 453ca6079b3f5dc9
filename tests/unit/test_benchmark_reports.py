"""What benchmarks say of their own figures."""

from __future__ import annotations

from benchmarks.throughput import LAYERWISE, LIMIT, WHOLE_RUN, standing

RATIOS = {LAYERWISE: 0.908, WHOLE_RUN: 0.95, LIMIT: 1.057, "DDP": 0.93, "1f1b": 0.91, "gpipe": 0.889}


def test_every_peer_that_is_ahead_is_named_and_no_other() -> None:
    text = standing(RATIOS)
    assert "missed by 4.2 points" in text
    assert "Ahead of it are 2 of 3 peers: DDP (0.930); 1f1b (0.910)." in text


def test_it_is_said_when_no_peer_is_ahead() -> None:
    text = standing(RATIOS | {LAYERWISE: 0.96})
    assert "is reached" in text
    assert "No peer is ahead of it." in text
