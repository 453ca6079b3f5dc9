"""Exact replay of a recorded run: every update again, bit for bit, in one process."""

from layerwise.replay.divergence import DivergedError, Divergence
from layerwise.replay.replay import Replay
from layerwise.replay.report import ReplayedLayer, ReplayReport
from layerwise.replay.until import Until, parse_until

__all__ = ["DivergedError", "Divergence", "Replay", "ReplayReport", "ReplayedLayer", "Until", "parse_until"]
