from __future__ import annotations

import socket
from pathlib import Path

import pytest

from layerwise.address import TcpAddress, UnixAddress, check_may_listen, parse_address, with_free_port
from layerwise.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "address", "loopback"),
    [
        ("localhost:80", TcpAddress(host="localhost", port=80), True),
        ("127.0.0.1:0", TcpAddress(host="127.0.0.1", port=0), True),
        ("127.8.9.10:65535", TcpAddress(host="127.8.9.10", port=65535), True),
        ("[::1]:7070", TcpAddress(host="::1", port=7070), True),
        ("[::]:7070", TcpAddress(host="::", port=7070), False),
        ("0.0.0.0:7070", TcpAddress(host="0.0.0.0", port=7070), False),
        ("machine-3.example:7070", TcpAddress(host="machine-3.example", port=7070), False),
    ],
)
def test_hosts_and_ports_are_read_and_loopback_is_known(text: str, address: TcpAddress, loopback: bool) -> None:
    assert parse_address(text) == address
    assert address.loopback is loopback
    assert str(address) == text


def test_unix_addresses_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir("/tmp")
    assert parse_address("unix:/a/b.sock") == UnixAddress(path=Path("/a/b.sock"))
    assert str(parse_address("unix:b.sock")) == "unix:/tmp/b.sock"


@pytest.mark.parametrize(
    "text", ["", ":1", "host", "host:", "host:-1", "host:1x", "host:65536", "unix:", "unix:/" + "x" * 107]
)
def test_anything_else_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        parse_address(text)


def test_a_port_is_refused_when_it_is_taken_and_free_when_it_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = TcpAddress(host="127.0.0.1", port=other.getsockname()[1])
        with pytest.raises(ConfigError, match=f"{taken}: it is taken"):
            check_may_listen(taken, insecure=False)
    check_may_listen(taken, insecure=False)
    check_may_listen(TcpAddress(host="localhost", port=0), insecure=False)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"can't listen on 192\.0\.2\.1:0: "):
        check_may_listen(TcpAddress(host="192.0.2.1", port=0), insecure=True)
    with pytest.raises(ConfigError, match=r"can't listen on no-such-host\.invalid:0: "):
        check_may_listen(TcpAddress(host="no-such-host.invalid", port=0), insecure=True)


def test_port_0_becomes_one_that_others_can_be_told() -> None:
    found = with_free_port(TcpAddress(host="127.0.0.1", port=0))
    assert isinstance(found, TcpAddress)
    assert found.host == "127.0.0.1"
    with socket.create_server(("127.0.0.1", found.port)):
        pass
    for address in (found, UnixAddress(path=Path("/a.sock"))):
        assert with_free_port(address) == address
    with pytest.raises(ConfigError, match=r"can't listen on 192\.0\.2\.1:0: "):
        with_free_port(TcpAddress(host="192.0.2.1", port=0))
