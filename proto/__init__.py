"""The wire: `layerwise.proto`, the code generated from it, and the only places that know that code.

Importing this needs neither torch nor gRPC.
"""

from layerwise.proto.convert import message_from_proto, message_to_proto
from layerwise.proto.frames import WireVersionError
from layerwise.version import WIRE_VERSION

__all__ = ["WIRE_VERSION", "WireVersionError", "message_from_proto", "message_to_proto"]
