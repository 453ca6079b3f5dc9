"""What a cut's folder says about itself: enough to go on from it with nothing else left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from layerwise.messages import BlockPlace, LayerFile
from layerwise.server.job_record import JobRecord

FORMAT = "layerwise-cut"
FORMAT_VERSION = 1
MAX_COMMIT_BYTES = (2 << 20) - 4096
"""Of a manifest and the list of its files: what `layerwise.proto.frames.MAX_ENVELOPE_BYTES` leaves for them."""
_BYTES_PER_FILE = 48
"""What a file takes in a message beside its name and its hash, at most."""


def manifest_json(
    record: JobRecord,
    route: Sequence[BlockPlace],
    version: int,
    files: Sequence[LayerFile],
    ledger: Mapping[str, Any],
) -> str:
    """The manifest of the cut at ``version``; `layerwise.server.adopted_job` makes a job of it again."""
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "job": record.job,
        "name": record.name,
        "version": version,
        "spec": json.loads(record.spec_json),
        "settings": json.loads(record.settings_json),
        "profile": json.loads(record.profile_json),
        "blocks": [{"start": one.start, "stop": one.stop, "life": one.life} for one in route],
        "next_life": record.next_life,
        "resume_count": record.resume_count,
        "created": record.created,
        "started": record.started,
        "ledger": dict(ledger),
        "evaluations": [dict(one) for one in record.evaluations],
        "rollbacks": [dict(one) for one in record.rollbacks],
        "files": [
            {"layer": one.layer, "life": one.life, "name": one.name, "bytes": one.num_bytes, "digest": one.digest}
            for one in files
        ],
    }
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"))


def why_too_large(manifest: str, files: Sequence[LayerFile]) -> str:
    """Why the first shard can't be asked to write ``manifest``; empty when it can."""
    listed = sum(len(one.name) + len(one.digest) + _BYTES_PER_FILE for one in files)
    num_bytes = len(manifest.encode()) + listed
    if num_bytes <= MAX_COMMIT_BYTES:
        return ""
    return (
        f"its manifest with the list of its {len(files)} files has {num_bytes} bytes, and at most {MAX_COMMIT_BYTES} can "
        f"be sent; fewer layers, or a shorter job file, make it smaller"
    )
