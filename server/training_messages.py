"""What the processes of a run tell its training."""

from __future__ import annotations

from layerwise.messages import (
    AttemptsClosed,
    BlockReport,
    CutCommitted,
    CutSaved,
    CutTaken,
    Evaluated,
    LeaseReturn,
    Message,
    Stopping,
)
from layerwise.roles import Effect
from layerwise.server.shard_places import ShardPlace
from layerwise.server.training import Training


def hear_shard(training: Training, place: ShardPlace, message: Message, now: float) -> list[Effect]:
    """The shard that fills ``place`` says something; what does not concern training changes nothing.

    Raises:
        ValueError: it is about another block.
    """
    here = place.block
    block = getattr(message, "block", here)
    if block != here:
        raise ValueError(f"it speaks for block {block}, which {place.process} does not hold")
    match message:
        case AttemptsClosed() if block == 0:
            return training.close(message, now)
        case CutTaken():
            return training.take_cut(message, now)
        case CutSaved():
            return training.save_cut(message, now)
        case CutCommitted() if block == 0:
            return training.commit_cut(message, now)
        case BlockReport():
            training.report(message)
        case Stopping() if block == 0:
            return training.stop_at(message.version, now)
    return []


def hear_worker(training: Training, name: str, message: Message, now: float) -> list[Effect]:
    """Worker ``name`` says something; what does not concern training changes nothing."""
    match message:
        case LeaseReturn():
            return training.take_back(name, message, now)
        case Evaluated():
            return training.evaluated(message, now)
    return []
