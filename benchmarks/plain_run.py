"""Synchronous training by the plain PyTorch loop, to its validation: ``python -m benchmarks.plain_run JOB.yaml [--set key=value]``."""

from __future__ import annotations

import argparse
import json
import time

import torch

from layerwise.data import load_dataset
from layerwise.overrides import read_job
from layerwise.reference import train_reference
from layerwise.settings import resolve


def main() -> None:
    """Train, evaluate, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = read_job(arguments.spec, arguments.overrides)
    data = load_dataset(spec.data)
    settings = resolve(spec, len(data.train), spec.cluster.shards)
    began = time.perf_counter()
    loop = train_reference(spec, settings)
    seconds = time.perf_counter() - began
    print(json.dumps({"validation": loop.evaluate(data.validation), "seconds": seconds, "steps": loop.version}))


if __name__ == "__main__":
    main()
