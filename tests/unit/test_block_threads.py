"""Several slots on one block: nothing hangs, nothing is lost, and every count comes out."""

from __future__ import annotations

import queue
import threading

import pytest
import torch
from torch import nn

from layerwise.events import UpdateEvent, WeightMode
from layerwise.tasks import BackwardTask, ForwardTask, run_to_end
from tests.unit.pipeline import OPTIMIZERS, Pipeline

WIDTH = 16


def model(shared: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.1)),
        nn.Linear(WIDTH, WIDTH),
        nn.Sequential(nn.Dropout(0.1), nn.GELU()),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, 5),
    ]
    if shared:
        layers[3].weight = layers[1].weight  # type: ignore[assignment]
    return layers


@pytest.mark.parametrize("mode", list(WeightMode))
@pytest.mark.parametrize("shared", [False, True])
def test_two_forward_and_two_backward_slots_apply_everything_once(mode: WeightMode, shared: bool) -> None:
    torch.manual_seed(2)
    inputs, targets = [torch.randn(64, WIDTH)], torch.randint(0, 5, (64,))
    pipeline = Pipeline(
        model(shared), inputs, targets, accumulation=2, num_updates=16, mode=mode, optimizer=OPTIMIZERS["adamw"]
    )
    block = pipeline.blocks[0]
    block.cut_at(8)
    block.hold_cut(8)
    total = pipeline.plan.num_microbatches
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    window = threading.Semaphore(4)
    errors: list[Exception] = []
    for index in range(total):
        todo.put(index)

    def forward() -> None:
        try:
            while True:
                window.acquire()
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    window.release()
                    return
                values, labels = pipeline.samples(index)
                task = ForwardTask(
                    attempt=pipeline.attempt(index),
                    number=index,
                    inputs=values,
                    targets=labels,
                    keep=True,
                    input_gradient=False,
                )
                run_to_end(block.forward(task))
                waiting.put(index)
        except Exception as error:
            errors.append(error)
            window.release(8)  # let the others end

    def backward() -> None:
        try:
            while (index := waiting.get()) is not None:
                run_to_end(block.backward(BackwardTask(attempt=pipeline.attempt(index), number=index, gradients=None)))
                window.release()
        except Exception as error:
            errors.append(error)
            window.release(8)  # let the others end

    forwards = [threading.Thread(target=forward) for _ in range(2)]
    backwards = [threading.Thread(target=backward) for _ in range(2)]
    for thread in (*forwards, *backwards):
        thread.start()
    for thread in forwards:
        thread.join()
    for _ in backwards:
        waiting.put(None)
    for thread in backwards:
        thread.join()
    assert errors == []
    assert block.store_bytes == 0
    for layer in block.layers:
        layer.ledger.staleness.check()
        assert layer.ledger.version == 16
        assert len(layer.ledger.applied) == total
        assert layer.num_stashes == 0
        digests = [
            one.event.digest
            for one in pipeline.events.records
            if isinstance(one.event, UpdateEvent) and one.event.layer == layer.index
        ]
        if not layer.module.buffer_names:
            assert layer.digest() == digests[-1]
        copied = block.shelf.get(8)[layer.index]
        assert copied.state.digest == digests[7]
    assert int(block.layers[0].module.buffers[2]) == total  # batches that the normalisation has seen
