"""The version of layerwise, of its wire format and of what it writes to disk."""

from __future__ import annotations

VERSION = "0.1.0"
WIRE_VERSION = 2
