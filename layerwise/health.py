"""Asking a process whether it serves, by the standard gRPC health service."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from layerwise.errors import UnreachableError


def check_health(address: str, *, seconds: float) -> str:
    """What the process at ``address`` says of itself: "serving", "not serving" or "unknown".

    Raises:
        UnreachableError: nobody answers within ``seconds``, or what answers has no health service.
    """
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.RpcError as error:
            raise UnreachableError(f"nothing healthy answers at {address}: {error.code().name.lower()}") from error
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    return name.lower().replace("_", " ")
