"""Whether what a process says of itself can be meant: the coordinator keeps it, shows it and hands it to others."""

from __future__ import annotations

from dataclasses import fields

from layerwise.address import check_can_be_dialed, parse_address
from layerwise.errors import ConfigError
from layerwise.messages import Hello, Role

LONGEST_WORD = 500
MOST_IMPORTS = 200
MEMBERS = (Role.SHARD, Role.FORWARD, Role.BACKWARD)


def hello_fault(peer: str, hello: Hello) -> str:
    """What is wrong with the ``hello`` that came over the link to ``peer``; empty when nothing is."""
    if hello.name != peer:
        return f"it calls itself {hello.name[:LONGEST_WORD]!r} there"
    if hello.role not in MEMBERS:
        return f"it is a {hello.role}, expected {', '.join(MEMBERS)}"
    words = {field.name: getattr(hello, field.name) for field in fields(hello)}
    for name, word in words.items():
        if isinstance(word, str) and (len(word) > LONGEST_WORD or not word.isprintable()):
            return f"its {name} is no word of at most {LONGEST_WORD} printable characters"
    imports = hello.allowed_imports
    if len(imports) > MOST_IMPORTS or any(len(one) > LONGEST_WORD for one in imports):
        return f"it allows more than {MOST_IMPORTS} imports, or longer ones than {LONGEST_WORD} characters"
    if hello.role is Role.SHARD and hello.join is not None:
        return "it is a shard that joins, and only workers can"
    if hello.role is Role.SHARD and not hello.address:
        return "it is a shard without an address, so nobody can reach it"
    for name, address in (("address", hello.address), ("metrics address", hello.metrics_address)):
        try:
            if address:
                parsed = parse_address(address)
                if name == "address":
                    check_can_be_dialed(parsed)
        except ConfigError as error:
            return f"its {name} can't be used: {error}"
    return ""
