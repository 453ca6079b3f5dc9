"""Executes a recorded run again, in one process and one thread, and compares every update with the record.

    logs of all blocks and lives ──► History ──► Start
    BlockReplay of each block: its next record, as soon as what it needs is there  ◄──► Exchange
    a life whose log has come to its end makes place for the next one of its layers, which begins at a cut of it

The order between blocks is free: a record waits only for outputs and gradients of the blocks beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from layerwise.device import resolve_device
from layerwise.errors import CorruptError, NotFoundError
from layerwise.events import CutEvent, Event, UpdateEvent
from layerwise.layer import LayerCopy, TrainedLayer
from layerwise.machine import this_machine
from layerwise.replay.block_replay import BlockReplay
from layerwise.replay.divergence import DivergedError, Divergence
from layerwise.replay.exchange import Exchange
from layerwise.replay.execution import Blocked
from layerwise.replay.history import History, Start, begins_with, choose_start, last_at, layers_of, read_history
from layerwise.replay.life_index import LifeIndex
from layerwise.replay.recorded_job import RecordedJob, recorded_job
from layerwise.replay.report import ReplayedLayer, ReplayReport
from layerwise.replay.saving import save_cut, save_layers
from layerwise.replay.until import Until
from layerwise.verify import first_difference

Progress = Callable[[int, int], None]
"""``progress(updates done, updates in all)``, now and then."""

CPU = torch.device("cpu")
_BURST = 256


class Replay:
    """One replay of a job's directory. Use it from one thread; `run` once.

    Afterwards ``layers`` are the layers as they are where it stopped, and ``copies`` those at the update that it was
    to stop at: parameters, buffers, moments, which debuggers may look at and change.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        start: int | None = None,
        until: Until | None = None,
        threads: int | None = None,
        device: torch.device | None = None,
        allowed_imports: Sequence[str] = (),
    ) -> None:
        """Read the logs once.

        ``start`` is the version to begin at, by default the newest possible one that is not after the oldest saved
        cut; ``threads`` of arithmetic are by default as many as were recorded; ``device`` is by default the CPU for what
        was recorded there, and the GPU of this machine, if it has one, for what was recorded on a GPU.

        Raises:
            NotFoundError: there is no log, no saved cut, or no place to begin at ``start``.
            CorruptError: a log can't be read.
            ConfigError, NotAllowedError: the job's model or data can't be used here.
        """
        self.job: RecordedJob = recorded_job(directory, allowed_imports)
        self.history: History = read_history(directory, self.job.owners)
        self.until = until
        self.start: Start = choose_start(self.history, self.job.saved, start)
        self.copies: dict[int, LayerCopy] = {}
        self._threads = threads
        self._device = device
        self._exchange = Exchange(self.job.samples, num_layers=self.history.num_layers)
        self._running: list[BlockReplay] = []
        self._waiting = list(self.history.after(self.start))
        self._lives = (*self.start.lives, *self._waiting)
        self._total = sum(one.num_updates for one in self._lives)
        self._current: dict[int, BlockReplay] = {}
        self._snapshots: dict[tuple[int, int], LayerCopy] = {}
        self._compared: set[int] = set()
        self._over: list[tuple[int, int]] = []
        self._left_out: list[str] = []
        self._wanted_index: int | None = None
        if until is not None and until.update is None:
            self._wanted_index = until.index(self._lives[-1].header.plan)

    @property
    def layers(self) -> dict[int, TrainedLayer]:
        """The layers as they are now, by index."""
        return {index: block.layers[index - block.index.header.start] for index, block in sorted(self._current.items())}

    def run(self, progress: Progress | None = None) -> ReplayReport:
        """Execute the records; what does not come about as recorded is in the report.

        Raises:
            CorruptError: a log or a cut can't be read.
        """
        began = time.monotonic()
        divergence: Divergence | None = None
        unfinished = ""
        with _threads_kept():
            self._set_threads(self.start.lives[0])
            notes = self._notes()
            try:
                for life in self.start.lives:
                    self._begin(life, inside=self.start.inside)
                unfinished = self._execute(progress)
            except DivergedError as error:
                divergence = replace(error.divergence, advice=_advice(error.divergence, notes))
        done = [*self._over, *((one.num_records, one.num_updates) for one in self._running)]
        stopped = str(self.until) if self.until is not None and self._reached() else ""
        if self.until is not None and not stopped and divergence is None and not unfinished:
            unfinished = f"the run ended before {self.until}"
        return ReplayReport(
            job=self.history.job,
            directory=str(self.job.directory),
            start=self.start.version,
            stopped_at=stopped,
            lives=len(done),
            records=sum(records for records, _ in done),
            updates=sum(updates for _, updates in done),
            cuts=tuple(sorted(self._compared)),
            layers=tuple(self._layer_facts()),
            left_out=tuple(self._left_out),
            notes=notes,
            unfinished=unfinished,
            divergence=divergence,
            seconds=time.monotonic() - began,
        )

    def save(self, folder: str | Path) -> Path:
        """Save the layers where the replay stopped, as a cut if that is an update; gives the folder of the files.

        Raises:
            NotAllowedError: ``folder`` is not empty.
        """
        copies = dict(self.copies)
        layers = self.layers
        between = {(layer.ledger.version, layer.ledger.accumulated) for layer in layers.values()}
        if len(copies) < len(layers) and len(between) == 1 and between.pop()[1] == 0:
            copies = {index: layer.copy() for index, layer in layers.items()}
        if len(copies) == len(layers):
            return save_cut(Path(folder), self.job, copies)
        return save_layers(Path(folder), layers)

    # --- order --------------------------------------------------------------------------------------------------------

    def _execute(self, progress: Progress | None) -> str:
        """Step every block as far as it comes, again and again; gives why a log was not executed to its end."""
        while not self._reached():
            moved = False
            for one in list(self._running):
                moved = self._burst(one) or moved
                if self._reached():
                    return ""
            if progress is not None:
                progress(sum(n for _, n in self._over) + sum(one.num_updates for one in self._running), self._total)
            moved = self._begin_next() or moved
            if moved:
                continue
            stuck = [one for one in self._running if one.next_record is not None]
            if not stuck:
                return ""
            if not self._relax(stuck) and not self._begin_next(alone=True) and not self._leave_out(stuck):
                return "; ".join(self._explain(one) for one in stuck)
        return ""

    def _burst(self, one: BlockReplay) -> bool:
        moved = False
        self._set_threads(one.index)
        for _ in range(_BURST):
            event = one.step()
            if event is None or isinstance(event, Blocked):
                break
            moved = True
            self._note(one, event)
            if self._reached():
                break
        return moved

    def _relax(self, stuck: Sequence[BlockReplay]) -> bool:
        """Let a block run ahead of the one above it, where only this holds it."""
        for one in stuck:
            event = one.step()
            if isinstance(event, Blocked) and event.crowded:
                event = one.step(crowded=True)
            if event is not None and not isinstance(event, Blocked):
                self._note(one, event)
                return True
        return False

    def _leave_out(self, stuck: Sequence[BlockReplay]) -> bool:
        """Give up the rest of a life which a later one has made void: records that it needs were lost with it."""
        for one in stuck:
            later = {layer for life in self._waiting for layer in layers_of(life)}
            if all(layer in later for layer in layers_of(one.index)):
                self._left_out.append(
                    f"{one.index}: its last {one.num_left} records were made void by a later life and are left out: "
                    f"{self._explain(one)}"
                )
                self._end(one)
                return True
        return False

    def _explain(self, one: BlockReplay) -> str:
        blocked = one.step()
        record = one.next_record
        reason = blocked.reason if isinstance(blocked, Blocked) else "nothing"
        return f"record {record.sequence if record else '?'} of {one.index} can't be executed: {reason}"

    # --- lives --------------------------------------------------------------------------------------------------------

    def _begin_next(self, *, alone: bool = False) -> bool:
        """Begin the lives whose layers' earlier lives are over.

        A job that goes on as a whole begins when all is over, with nothing on its way: attempts may have been counted
        anew. ``alone``: what looks like that are blocks that were restored one after the other.
        """
        begun = False
        for life in list(self._waiting):
            lives = (life,) if alone else self.history.joint(life)
            if life not in self._waiting or any(one not in self._waiting for one in lives):
                continue
            layers = {layer for one in lives for layer in layers_of(one)}
            earlier = [one for one in self._waiting if one not in lives and one.header.life < life.header.life]
            if any(layers.intersection(layers_of(one)) for one in earlier):
                continue
            before = [one for one in self._running if layers.intersection(layers_of(one.index))]
            if any(one.next_record is not None for one in before):
                continue
            for one in before:
                self._end(one)
            if len(lives) > 1:
                self._exchange.clear()
            for one_life in lives:
                self._waiting.remove(one_life)
                self._begin(one_life, inside=False)
            begun = True
        return begun

    def _begin(self, life: LifeIndex, *, inside: bool) -> None:
        version = self.start.version if inside else life.version
        copies = [self._saved(layer, version, life) for layer in layers_of(life)] if version else None
        self._set_threads(life)
        block, emitted = self.job.build(life.header, copies, inside=inside, device=self._device_of(life))
        one = BlockReplay(
            life,
            block,
            emitted,
            self._exchange,
            owners=self.job.owners,
            head=self.job.head if life.header.stop == self.history.num_layers else None,
            on_cut=lambda event, copy: self._on_cut(life, event, copy),
            after_cut=self.start.version if inside else None,
        )
        self._running.append(one)
        for layer in block.layers:
            self._current[layer.index] = one
            self._catch(one, layer)

    def _end(self, one: BlockReplay) -> None:
        self._running.remove(one)
        self._over.append((one.num_records, one.num_updates))
        one.close()

    def _saved(self, layer: int, version: int, life: LifeIndex) -> LayerCopy:
        """What ``layer`` begins ``life`` with."""
        copy = self._snapshots.get((layer, version)) or self.job.saved_copy(version, layer)
        if copy is None:
            raise NotFoundError(
                f"{life} begins at version {version}, of which there is neither a file any more nor a record before the "
                f"start of the replay at version {self.start.version}; begin earlier"
            )
        if not any((layer, version) in begins_with(one) for one in self._waiting):
            self._snapshots.pop((layer, version), None)
        return copy

    # --- what is seen on the way --------------------------------------------------------------------------------------

    def _note(self, one: BlockReplay, event: Event) -> None:
        if isinstance(event, UpdateEvent):
            self._catch(one, one.layers[event.layer - one.index.header.start])

    def _catch(self, one: BlockReplay, layer: TrainedLayer) -> None:
        """Keep a copy where the replay is to stop: of the newest life that was at the update."""
        update = None if self.until is None else self.until.update
        if layer.ledger.version == update and last_at(self._lives, layer.index, update) is one.index:
            self.copies[layer.index] = layer.copy()

    def _on_cut(self, life: LifeIndex, event: CutEvent, copy: LayerCopy) -> None:
        key = (event.layer, event.version)
        if any(key in begins_with(one) for one in self._waiting):
            self._snapshots[key] = copy
        file = self.job.saved_file(event.version, event.layer)
        if file is not None and file.life == life.header.life:
            saved = self.job.saved_copy(event.version, event.layer)
            assert saved is not None
            difference = first_difference(_named(saved), _named(copy.to(CPU)))
            if difference is not None:
                raise CorruptError(
                    f"the saved cut {event.version} differs from the replay in layer {event.layer}, though its hash in "
                    f"the event log does not: {difference}"
                )
            self._compared.add(event.version)

    def _reached(self) -> bool:
        if self.until is None:
            return False
        if self.until.update is not None:
            return len(self.copies) == self.history.num_layers
        wanted = self._wanted_index
        assert wanted is not None
        layers = self.layers
        return len(layers) == self.history.num_layers and not any(one.ledger.lacks(wanted) for one in layers.values())

    def _layer_facts(self) -> Iterator[ReplayedLayer]:
        for index, layer in self.layers.items():
            header = self._current[index].index.header
            copy = self.copies.get(index)
            yield ReplayedLayer(
                layer=index,
                name=header.layer_names[index - header.start],
                life=header.life if copy is None else copy.life,
                version=layer.ledger.version if copy is None else copy.state.version,
                digest=layer.ledger.digest if copy is None else copy.state.digest,
            )

    # --- the machine --------------------------------------------------------------------------------------------------

    def _set_threads(self, life: LifeIndex) -> None:
        machine = life.header.machine
        wanted = self._threads if self._threads is not None else (machine.threads if machine is not None else None)
        if wanted is not None and wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)

    def _device_of(self, life: LifeIndex) -> torch.device:
        if self._device is not None:
            return self._device
        machine = life.header.machine
        return CPU if machine is None or machine.device == CPU.type else resolve_device("auto")

    def _notes(self) -> tuple[str, ...]:
        """In what this machine differs from the recorded ones."""
        found: dict[str, None] = {}
        for life in self._lives:
            machine = life.header.machine
            if machine is None:
                found[f"{life} does not say on what it was computed"] = None
                continue
            here = this_machine(self._device_of(life), self.job.spec.train.precision)
            mine = here if self._threads is not None else replace(here, threads=machine.threads)
            found.update(dict.fromkeys(machine.differences(mine)))
        return tuple(found)


def _named(copy: LayerCopy) -> dict[str, torch.Tensor]:
    groups = (("parameter", copy.parameters), ("buffer", copy.buffers), ("moment", copy.moments))
    return {f"{kind}:{name}": tensor for kind, group in groups for name, tensor in group.items()}


def _advice(divergence: Divergence, notes: Sequence[str]) -> str:
    if notes:
        return "the machine is another: " + "; ".join(notes)
    return (
        "processor, torch and threads of the shards are the recorded ones: look at detached workers (they need the "
        "same), at operations that do not repeat, or for a log or data that were changed"
    )


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Leave torch's number of threads as it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
