"""Where a process listens: ``unix:/path`` on one host, ``host:port`` between hosts."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import ConfigError, NotAllowedError

_MAX_UNIX_PATH_BYTES = 107


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixAddress:
    """A socket in the file system; who may open its folder may connect."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpAddress:
    """A host (name or number) and a port; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only processes of this host can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def everywhere(self) -> bool:
        """Whether it stands for all addresses of the machine that listens there."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Read ``unix:/path``, ``host:port`` or ``[ipv6]:port``.

    Raises:
        ConfigError: it is none of these.
    """
    if text.startswith("unix:"):
        path = Path(text.removeprefix("unix:")).absolute()
        if text == "unix:" or len(os.fsencode(path)) > _MAX_UNIX_PATH_BYTES:
            raise ConfigError(
                f"address {text!r}: a unix socket needs a path of 1 to {_MAX_UNIX_PATH_BYTES} bytes, use a shorter one"
            )
        return UnixAddress(path=path)
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"address {text!r} is neither host:port (port 0 to 65535) nor unix:/path")
    return TcpAddress(host=host, port=int(port))


def check_can_be_dialed(address: Address) -> None:
    """Refuse what a process may listen at but nobody can call.

    Raises:
        ConfigError: it stands for every address of a machine, or has no port.
    """
    if isinstance(address, TcpAddress) and (address.everywhere or not address.port):
        reason = "stands for all addresses of a machine" if address.everywhere else "has no port"
        raise ConfigError(f"nobody can call {address}, which {reason}; say a host and port under which others reach it")


def check_advertised(listen: str, advertise: str) -> None:
    """Refuse a shard that nobody could call: its address is ``advertise``, or else ``listen`` with the port it gets.

    Raises:
        ConfigError: that is no address, or stands for all addresses of the machine.
    """
    if advertise:
        check_can_be_dialed(parse_address(advertise))
        return
    address = parse_address(listen)
    if isinstance(address, TcpAddress) and address.everywhere:
        raise ConfigError(
            f"--listen {address} stands for all addresses of this machine, so nobody knows where to call; say --advertise "
            "with the host and port under which others reach it"
        )


def check_may_listen(address: Address, *, insecure: bool) -> None:
    """Refuse what would let strangers in, and what is taken; makes the folder of a unix socket (mode 0700).

    Raises:
        NotAllowedError: beyond this host without ``insecure``, or a socket's folder that others may open.
        ConfigError: a process already listens there, or it is no address of this machine.
    """
    if isinstance(address, TcpAddress):
        if not address.loopback and not insecure:
            raise NotAllowedError(
                f"listening on {address} would let every machine that reaches it control this process, without"
                " encryption or password; use a loopback address or a unix socket, or say --insecure on a network"
                " that you trust"
            )
        if reason := _try_to_listen(address)[1]:
            raise ConfigError(
                f"can't listen on {address}: {reason}; choose another address (port 0 takes a port that is free)"
            )
        return
    folder = address.path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        raise ConfigError(f"{folder}, the folder of socket {address}, can't be made: {error.strerror}") from error
    if state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o077:
        raise NotAllowedError(
            f"the folder of {address} is open to other users (mode {stat.S_IMODE(state.st_mode):04o});"
            " use a folder of your own of mode 0700"
        )
    if _answers(address.path):
        raise ConfigError(f"{address} is taken: another process listens there; stop it or choose another address")


def with_free_port(address: Address) -> Address:
    """``address`` with a port that is free now in the place of port 0, for one that others are told before anybody listens.

    Raises:
        ConfigError: nobody can listen there.
    """
    if not isinstance(address, TcpAddress) or address.port:
        return address
    port, reason = _try_to_listen(address)
    if reason:
        raise ConfigError(f"can't listen on {address}: {reason}; choose another address")
    return TcpAddress(host=address.host, port=port)


def _try_to_listen(address: TcpAddress) -> tuple[int, str]:
    """The port that a socket at ``address`` has, and why nobody can listen there now; that is empty where one can.

    gRPC would say so too, but with lines of its own on standard error, and only after everything else was loaded.
    """
    reason = ""
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                with socket.socket(family, kind, protocol) as probe:
                    # As gRPC does, so that connections that have just ended are not in the way.
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(place)
                    return int(probe.getsockname()[1]), ""
            except OSError as error:
                reason = _in_words(error)
    except OSError as error:  # no such name
        reason = _in_words(error)
    return 0, reason


def _in_words(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "it is taken, another process listens there"
    return str(error.strerror or error)


def _answers(path: Path) -> bool:
    """Whether a process listens on the socket at ``path`` (one left behind by a dead process does not count)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
