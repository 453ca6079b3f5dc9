from __future__ import annotations

import pytest

from layerwise.errors import MalformedMessageError
from layerwise.messages import CommitCut, LayerFile
from layerwise.proto.frames import MAX_ENVELOPE_BYTES, encode_message
from layerwise.server.cut_manifest import MAX_COMMIT_BYTES, why_too_large


def file(layer: int) -> LayerFile:
    return LayerFile(
        layer=layer, life=1 << 40, name=f"layer-{layer:05d}.safetensors", num_bytes=1 << 50, digest="f" * 32
    )


@pytest.mark.parametrize("num_files", [1, 5000])
def test_what_is_small_enough_can_be_sent(num_files: int) -> None:
    files = tuple(file(layer) for layer in range(num_files))
    most = MAX_COMMIT_BYTES
    while why_too_large("x" * most, files):
        most -= 1000
    commit = CommitCut(job="j" * 64, version=1 << 50, files=files, manifest_json="x" * most, keep=tuple(range(100)))
    encode_message(commit)
    assert "at most" in why_too_large("x" * (most + 1000), files)
    with pytest.raises(MalformedMessageError):
        encode_message(CommitCut(job="j", version=1, files=files, manifest_json="x" * MAX_ENVELOPE_BYTES, keep=()))
