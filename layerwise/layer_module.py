"""One layer's module: its tensors by name, and calls with other tensors in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from layerwise.errors import ConfigError
from layerwise.messages import Tensors

Slot = tuple[dict[str, Any], str]
"""A module's own table of parameters or buffers, and the key in it."""


class LayerModule:
    """Finds a module's parameters and buffers once, so that exchanging them for others costs nanoseconds.

    Buffers are *never written in place* by a training pass: a pass that may write them gets copies, and the copies
    take the place of the originals when the write counts. So a buffer tensor that somebody holds (a pending backward
    pass, a cut) stays as it was read.

    Exchanging changes the module that everybody sees: only under the layer's exclusive lock.
    """

    def __init__(self, module: nn.Module, index: int, name: str) -> None:
        self.module = module
        self.index = index
        self.name = name
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self._parameter_slots = _slots(module, "_parameters", self.parameters.values())
        buffers = dict(module.named_buffers())
        self.buffer_names = tuple(buffers)
        self._buffer_slots = _slots(module, "_buffers", buffers.values())
        self._storages = frozenset(p.untyped_storage().data_ptr() for p in self.parameters.values())
        self._written = _written_by_kernels(module, self.buffer_names)
        self._known = not buffers

    @property
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """The buffers as they are now, in the order of ``buffer_names``."""
        return tuple(slots[0][0][slots[0][1]] for slots in self._buffer_slots)

    @property
    def may_write_buffers(self) -> bool:
        """Whether a forward pass must be given copies of buffers: known after the first one, until then assumed."""
        return not self._known or bool(self._written)

    def set_buffers(self, buffers: Sequence[torch.Tensor]) -> None:
        """Put other tensors in the buffers' places."""
        for slots, buffer in zip(self._buffer_slots, buffers, strict=True):
            for table, key in slots:
                table[key] = buffer

    def copies_for_writing(self, buffers: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """``buffers``, with copies of those that a forward pass writes (of all, as long as that is not known)."""
        return tuple(
            buffer.clone() if not self._known or name in self._written else buffer
            for name, buffer in zip(self.buffer_names, buffers, strict=True)
        )

    def learn_written(self, before: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """After a pass that had ``given`` in place of ``before``: the buffers it left; notes which ones it wrote.

        Some kernels write without telling autograd's version counter, and some writes leave the values as they were,
        so the first pass, which was given copies of all, is judged by both.
        """
        after = tuple(buffer.detach() if buffer.requires_grad else buffer for buffer in self.buffers)
        for name, old, new, now in zip(self.buffer_names, before, given, after, strict=True):
            if name in self._written:
                continue
            if now is not new or (not self._known and (now._version > 0 or not _same(old, now))):
                self._written |= {name}
        self._known = True
        return after

    @contextmanager
    def exchanged(
        self,
        *,
        parameters: Sequence[torch.Tensor] | None = None,
        buffers: Sequence[torch.Tensor] | None = None,
        training: bool = True,
    ) -> Iterator[None]:
        """Within it the module has these tensors (in the order of its own); afterwards it has its own again."""
        own_parameters, own_buffers = tuple(self.parameters.values()), self.buffers
        try:
            if parameters is not None:
                self._set_parameters(parameters)
            if buffers is not None:
                self.set_buffers(buffers)
            if not training:
                was_training = [one for one in self.module.modules() if one.training]
                self.module.eval()
            yield
        finally:
            if not training:
                for one in was_training:
                    one.training = True
            if parameters is not None:
                self._set_parameters(own_parameters)
            if buffers is not None:
                self.set_buffers(own_buffers)

    def _set_parameters(self, parameters: Sequence[torch.Tensor]) -> None:
        for slots, parameter in zip(self._parameter_slots, parameters, strict=True):
            for table, key in slots:
                table[key] = parameter

    def __call__(self, items: tuple[Any, ...], single: bool) -> Tensors:
        """Run the module on what the layer before put out (a tuple is one argument, as in ``nn.Sequential``).

        Raises:
            ConfigError: it returned something else than a tensor or a tuple of tensors and ``None``.
        """
        output = self.module(items[0] if single else items)
        if isinstance(output, torch.Tensor):
            return Tensors((self._own(output),))
        if isinstance(output, tuple | list) and all(one is None or isinstance(one, torch.Tensor) for one in output):
            return Tensors(tuple(None if one is None else self._own(one) for one in output), single=False)
        raise ConfigError(
            f"layer {self.index} ({self.name}) returned {_describe(output)}, expected a tensor or a tuple of tensors"
        )

    def _own(self, output: torch.Tensor) -> torch.Tensor:
        """``output``, or a copy where it lies in a parameter's memory and the next update would change it."""
        if self._storages and output.untyped_storage().data_ptr() in self._storages:
            return output.clone()
        return output


def _slots(module: nn.Module, table: str, tensors: Iterable[torch.Tensor]) -> tuple[tuple[Slot, ...], ...]:
    """For each of ``tensors`` every place in ``module`` that holds it."""
    places: dict[int, list[Slot]] = {id(tensor): [] for tensor in tensors}
    for one in module.modules():
        own: dict[str, Any] = getattr(one, table)
        for key, tensor in own.items():
            if tensor is not None and id(tensor) in places:
                places[id(tensor)].append((own, key))
    return tuple(tuple(slots) for slots in places.values())


def _written_by_kernels(module: nn.Module, names: tuple[str, ...]) -> frozenset[str]:
    """Buffers of normalisations with running statistics: they are written whatever the first batch shows."""
    prefixes = tuple(
        f"{prefix}." if prefix else ""
        for prefix, one in module.named_modules()
        if isinstance(one, _NormBase) and one.track_running_stats
    )
    return frozenset(
        name for name in names for prefix in prefixes if name.startswith(prefix) and "." not in name[len(prefix) :]
    )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _describe(output: object) -> str:
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} with {', '.join(sorted({type(one).__name__ for one in output}))} in it"
    return f"a {type(output).__name__}"
