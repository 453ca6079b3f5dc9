from __future__ import annotations

from layerwise.messages import Echo, Echoed
from layerwise.roles import Connect, Send
from layerwise.server.hop_probe import ROUNDS, SILENCE_SECONDS, HopProbe


def probe(peer: str = "shard-1") -> HopProbe:
    return HopProbe(job="j", peer=peer, address="unix:/x", payload=b"x")


def test_a_hop_is_the_median_of_the_rounds_after_the_first() -> None:
    hop, now = probe(), 0.0
    effects = hop.begin(now)
    assert isinstance(effects[0], Connect)
    for number, seconds in enumerate([9.0, 0.3, 0.1, 0.2, 5.0, 0.2]):
        sent = effects[-1]
        assert isinstance(sent, Send)
        assert isinstance(sent.message, Echo)
        assert sent.message.round == number
        now += seconds
        effects = hop.on_echoed("shard-1", Echoed(job="j", round=number), now)
    assert hop.done
    assert not effects
    assert abs(hop.seconds - 0.2) < 1e-9
    assert number == ROUNDS


def test_a_repeated_or_foreign_answer_changes_nothing() -> None:
    hop = probe()
    hop.begin(0.0)
    assert hop.on_echoed("shard-2", Echoed(job="j", round=0), 1.0) == []
    assert hop.on_echoed("shard-1", Echoed(job="j", round=1), 1.0) == []
    assert not hop.done


def test_a_peer_that_is_lost_or_silent_leaves_the_hop_unmeasured() -> None:
    lost, silent = probe(), probe()
    for hop in (lost, silent):
        hop.begin(0.0)
    lost.on_lost("shard-1")
    silent.on_tick(SILENCE_SECONDS + 0.1)
    assert (lost.done, lost.seconds, silent.done, silent.seconds) == (True, 0.0, True, 0.0)
    assert probe(peer="").done
