from __future__ import annotations

import threading

import torch

from layerwise.ids import Microbatch
from layerwise.randomness import layer_randomness, layer_seed


def test_a_seed_follows_from_job_seed_microbatch_and_layer_only() -> None:
    base = layer_seed(1, Microbatch(0, 8, 16), 3)
    assert base == layer_seed(1, Microbatch(0, 8, 16), 3)
    others = {
        layer_seed(2, Microbatch(0, 8, 16), 3),
        layer_seed(1, Microbatch(1, 8, 16), 3),
        layer_seed(1, Microbatch(0, 0, 16), 3),
        layer_seed(1, Microbatch(0, 8, 24), 3),
        layer_seed(1, Microbatch(0, 8, 16), 4),
    }
    assert len(others | {base}) == 6
    assert all(0 <= seed < 2**63 for seed in others)


def test_seeds_are_frozen() -> None:
    # Runs of other versions and machines must be repeatable: these values never change.
    assert layer_seed(1, Microbatch(0, 0, 8), 0) == 5612758372501708498
    assert layer_seed(2**63 - 1, Microbatch(7, 64, 128), 31) == 6035284559338283287


def test_threads_draw_as_if_they_were_alone() -> None:
    def draws(seed: int) -> list[torch.Tensor]:
        found = []
        for _ in range(50):
            with layer_randomness(seed):
                found.append(torch.cat([torch.rand(3), torch.dropout(torch.ones(4), 0.5, True)]))
        return found

    alone = [draws(seed)[0] for seed in range(4)]
    results: dict[int, list[torch.Tensor]] = {}
    threads = [threading.Thread(target=lambda seed=seed: results.update({seed: draws(seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert all(torch.equal(one, alone[seed]) for one in results[seed])


def test_an_error_inside_gives_the_generator_back() -> None:
    try:
        with layer_randomness(1):
            raise KeyError("layer")
    except KeyError:
        pass
    with layer_randomness(2):
        pass
