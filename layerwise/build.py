"""From a coordinator's assignment to the layers that a process trains or computes with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from layerwise.applied import AppliedSet
from layerwise.assembly import Training, assemble, compute_layer, foreign_parameters
from layerwise.block import Block
from layerwise.cut_shelf import CutEvents, CutShelf
from layerwise.cut_writer import CutWriter
from layerwise.cuts import cut_folder, layer_files, load_manifest
from layerwise.data import load_dataset
from layerwise.data_info import DataInfo
from layerwise.detached import DetachedBlock, PulledStates
from layerwise.device import transfers
from layerwise.errors import ConfigError, CorruptCutError, CorruptError, NotFoundError
from layerwise.event_log import EventLog, LogHeader
from layerwise.events import WeightMode
from layerwise.fences import Fence, raise_fence
from layerwise.head import job_head
from layerwise.job import JobSpec, parse_job
from layerwise.layer import LayerCopy
from layerwise.layer_compute import LayerCompute, Precision
from layerwise.layer_file import load_layer, read_layer
from layerwise.machine import Machine, this_machine
from layerwise.messages import Assignment, BlockPlace
from layerwise.models import build_model, load_weights
from layerwise.policies import delay_policy
from layerwise.profile import Profile
from layerwise.rollbacks import write_rollbacks
from layerwise.settings import ResolvedSettings
from layerwise.standby_bytes import LayerBytes
from layerwise.standby_writer import StandbyWriter, Written
from layerwise.state_hash import HASH_ALGORITHM


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltBlock:
    """A block that is ready to train, and what belongs to it. ``applied`` has each layer's set as restored."""

    block: Block
    spec: JobSpec
    settings: ResolvedSettings
    profile: Profile
    place: BlockPlace
    events: EventLog
    writer: CutWriter
    applied: tuple[AppliedSet, ...]
    standby: StandbyWriter | None

    def close(self) -> None:
        """Save the cuts that wait and end the log; any thread but the writers'."""
        if self.standby is not None:
            self.standby.close()
        self.writer.close()
        self.events.close()


def build_block(
    assignment: Assignment,
    *,
    device: torch.device,
    cut_events: CutEvents,
    allowed_imports: Sequence[str] = (),
    standby: Mapping[int, LayerBytes] | None = None,
    standby_written: Written | None = None,
) -> BuiltBlock:
    """Carry out a shard's assignment: build the model, keep the block's layers, restore the cut, begin the log.

    ``standby`` has the layers that take the cut's place where the assignment says so. ``standby_written`` is told, on a thread
    of its own, of the block's own standby copies.

    Raises:
        ConfigError, NotAllowedError: the job's model, data or initial weights can't be used here.
        CorruptCutError: the cut is not there, or damaged; the one before may do.
        CorruptError: it does not fit the model.
        WrongLifeError: a later life of one of the layers has begun.
        OSError: the disk refuses what a life has to leave there before it begins.
    """
    spec, settings, profile = _documents(assignment)
    place = assignment.route[assignment.block]
    restored = standby is not None or assignment.cut > 0
    modules = build_modules(spec, _data_info(spec, profile, allowed_imports), allowed_imports, restored=restored)
    _check_profile(modules, profile)
    trainable_below = any(one.requires_grad for module in modules[: place.start] for one in module.parameters())
    moves = transfers(device)
    with moves.computing():
        own = [module.to(device) for module in modules[place.start : place.stop]]
    names = [profile.layers[index].name for index in range(place.start, place.stop)]
    head = job_head(spec, allowed_imports) if place.stop == len(modules) else None
    del modules
    copies = _load_standby(assignment, standby) if standby is not None else _load_cut(assignment, place)
    course = assignment.course
    training = replace(training_of(spec, settings, device), rate_factor=course.rate_factor)
    if assignment.block == 0 and assignment.rollbacks_json:
        # Before the fence, for what is rolled back counts no more once that is up.
        write_rollbacks(assignment.directory, json.loads(assignment.rollbacks_json))
    raise_fence(
        assignment.directory, Fence(life=place.life, start=place.start, stop=place.stop, version=assignment.cut)
    )
    machine = this_machine(device, spec.train.precision)
    events = EventLog(assignment.directory, _log_header(assignment, place, settings, names, machine))
    try:
        with moves.computing():
            layers = assemble(
                own,
                names,
                training,
                events,
                start=place.start,
                life=place.life,
                states=None if copies is None else [copy.state for copy in copies],
                profiles=profile.layers[place.start : place.stop],
            )
            for layer, copy in zip(layers, copies or (), strict=False):
                try:
                    layer.restore(copy)
                    if assignment.cut == course.version:
                        layer.forget_moments()
                except ValueError as error:
                    raise CorruptError(
                        f"the {'cut' if standby is None else 'standby copy'} of version {assignment.cut} does not fit the "
                        f"job's model: {error}"
                    ) from error
            kept = [copy.to(device) for copy in copies or ()] if standby is None else []
    except BaseException:
        events.close()
        raise
    writer = CutWriter(assignment.directory, assignment.job, before_save=events.sync)
    shelf = CutShelf(len(layers), cut_events, writer.save)
    shelf.restore(kept)
    block = Block(
        layers,
        settings.plan,
        shelf,
        mode=WeightMode(settings.backward_weights),
        head=head,
        trainable_below=trainable_below,
        transfers=moves,
        precision=training.precision,
    )
    standby_writer = None
    if settings.standby_every and standby_written is not None:
        standby_writer = StandbyWriter(assignment.job, len(layers), standby_written, before_write=events.sync)
        block.copy_every(settings.standby_every, standby_writer.put)
    return BuiltBlock(
        block=block,
        spec=spec,
        settings=settings,
        profile=profile,
        place=place,
        events=events,
        writer=writer,
        applied=tuple(layer.ledger.applied.copy() for layer in layers),
        standby=standby_writer,
    )


def build_detached(
    assignment: Assignment, *, device: torch.device, allowed_imports: Sequence[str] = ()
) -> DetachedBlock:
    """Carry out a detached backward worker's assignment: the same layers, whose weights come with the tasks.

    Raises:
        ConfigError, NotAllowedError: the job's model or data can't be used here.
    """
    spec, _, profile = _documents(assignment)
    place = assignment.route[assignment.block]
    modules = build_modules(spec, _data_info(spec, profile, allowed_imports), allowed_imports, restored=True)
    _check_profile(modules, profile)
    if spec.init is not None and any(any(True for _ in one.buffers()) for one in modules[place.start : place.stop]):
        # Parameters come with the tasks, and so do the buffers that passes write; the others do not.
        load_weights(modules, spec.init)
    moves = transfers(device)
    with moves.computing():
        own = [module.to(device) for module in modules[place.start : place.stop]]
    last = place.stop == len(modules)
    precision = precision_of(spec, device)
    states = PulledStates()
    layers: list[LayerCompute] = []
    for position, (module, foreign) in enumerate(zip(own, foreign_parameters(own, place.start), strict=True)):
        index = place.start + position
        layers.append(
            compute_layer(
                module,
                index,
                profile.layers[index].name,
                seed=spec.train.seed,
                version=lambda index=index: states.version(index),  # type: ignore[misc]
                precision=precision,
                clones_input=profile.layers[index].clones_input,
                foreign=foreign,
                lower=[layers[owner - place.start] for owner in sorted({owner for _, (owner, _) in foreign})],
            )
        )
    return DetachedBlock(
        layers,
        states,
        head=job_head(spec, allowed_imports) if last else None,
        transfers=moves,
        precision=precision,
    )


def build_modules(
    spec: JobSpec, info: DataInfo, allowed_imports: Sequence[str] = (), *, restored: bool = False
) -> list[nn.Module]:
    """The job's whole model on the host with its initial weights: those that its seed gives, or those of ``init``.

    ``restored``: a cut takes the place of all of them, so that the file of ``init`` need not be there any more.
    """
    modules = build_model(spec.model, spec.train.seed, info, allowed_imports)
    if spec.init is not None and not restored:
        load_weights(modules, spec.init)
    return modules


def precision_of(spec: JobSpec, device: torch.device) -> Precision:
    """The arithmetic that the job's layers run in."""
    return Precision(device=device, autocast=torch.bfloat16 if spec.train.precision == "bf16" else None)


def training_of(spec: JobSpec, settings: ResolvedSettings, device: torch.device) -> Training:
    """How the job's layers are trained."""
    return Training(
        plan=settings.plan,
        seed=spec.train.seed,
        optimizer=spec.train.optimizer,
        schedule=spec.train.schedule,
        clip=spec.train.clip,
        policy=delay_policy(settings.delay_policy),
        position_order=settings.mode == "synchronous",
        precision=precision_of(spec, device),
        finite_buffers=spec.train.on_bad_sample == "drop",
        finite_gradients=spec.train.on_divergence != "ignore",
    )


def _documents(assignment: Assignment) -> tuple[JobSpec, ResolvedSettings, Profile]:
    return (
        parse_job(json.loads(assignment.spec_json), source=assignment.job),
        ResolvedSettings.from_json(assignment.settings_json),
        Profile.from_json(assignment.profile_json),
    )


def _data_info(spec: JobSpec, profile: Profile, allowed_imports: Sequence[str]) -> DataInfo:
    if profile.data_json:
        return DataInfo.from_json(profile.data_json)
    return load_dataset(spec.data, allowed_imports).info


def _check_profile(modules: Sequence[nn.Module], profile: Profile) -> None:
    found = [sum(one.numel() for one in module.parameters()) for module in modules]
    expected = [layer.parameters for layer in profile.layers]
    if found != expected:
        raise ConfigError(
            f"model: this process builds {len(found)} layers with {sum(found)} parameters, the job was planned with "
            f"{len(expected)} layers and {sum(expected)}; the same code must be installed everywhere"
        )


def _load_standby(assignment: Assignment, layers: Mapping[int, LayerBytes]) -> list[LayerCopy]:
    # Its bytes are those that were copied, so that what is wrong with them is a bug and no reason to try another one.
    where = Path(f"the memory of {assignment.standby.holder}")
    return [
        read_layer(bytes(layers[file.layer].data), assignment.cut, file, path=where / file.name)
        for file in assignment.standby.files
    ]


def _load_cut(assignment: Assignment, place: BlockPlace) -> list[LayerCopy] | None:
    if not assignment.cut:
        return None
    try:
        manifest = load_manifest(assignment.directory, assignment.cut)
    except NotFoundError as error:
        folder = cut_folder(assignment.directory, assignment.cut)
        raise CorruptCutError(str(error), version=assignment.cut, path=folder) from None
    files = {file.layer: file for file in layer_files(manifest)}
    missing = [index for index in range(place.start, place.stop) if index not in files]
    if missing:
        raise CorruptCutError(
            f"the manifest of cut {assignment.cut} in {assignment.directory} names no file of layers {missing}",
            version=assignment.cut,
            path=cut_folder(assignment.directory, assignment.cut),
        )
    return [load_layer(assignment.directory, assignment.cut, files[index]) for index in range(place.start, place.stop)]


def _log_header(
    assignment: Assignment, place: BlockPlace, settings: ResolvedSettings, names: list[str], machine: Machine
) -> LogHeader:
    return LogHeader(
        job=assignment.job,
        start=place.start,
        stop=place.stop,
        num_layers=assignment.route[-1].stop,
        life=place.life,
        hash_algorithm=HASH_ALGORITHM,
        plan=settings.plan,
        window=settings.window,
        max_staleness=settings.max_staleness,
        position_order=settings.mode == "synchronous",
        backward_weights=settings.backward_weights,
        layer_names=tuple(names),
        machine=machine,
        rate_factor=assignment.course.rate_factor,
        synchronous_until=assignment.course.synchronous_until,
        moments_forgotten=assignment.cut == assignment.course.version,
    )
