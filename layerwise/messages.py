"""What the processes say to each other.

Plain frozen values: no protobuf, no sockets. `layerwise.proto` turns each into its wire form and back. Tensors ride in `Tensors`, whose items
are opaque here, so that the same messages run in the simulated world. A message to a shard carries ``life``: the life of the
receiver's block as the sender knows it; the receiver refuses any other (`protocol: nothing acts on an older life`). What the first shard
says to a forward worker carries the first shard's life, so that an answer to the run before is not taken for one to this run.

    forward worker          first shard                 next shard ...              last shard
        Offer  ───────────►  (position order, window)
               ◄───────────  Grant
        Forward ──────────►  Forward ─────────────────►  Forward ───────────────►   loss
                             BoundaryGradient ◄────────  BoundaryGradient ◄──────
        Closed ◄───────────  BlockClosed ◄─────────────  BlockClosed ◄───────────
                             └── AttemptsClosed ──► coordinator
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from layerwise.ids import Attempt, Microbatch


class Outcome(StrEnum):
    """How an attempt ended."""

    APPLIED = "applied"
    DROPPED = "dropped"
    ABORTED = "aborted"


class Role(StrEnum):
    """What a process does."""

    COORDINATOR = "coordinator"
    SHARD = "shard"
    FORWARD = "forward"
    BACKWARD = "backward"
    CLIENT = "client"


class LeaseKind(StrEnum):
    """What a lease is for."""

    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class Tensors:
    """What one layer hands to the next (or the gradient of it): a tensor, or a tuple of them with ``None`` where there is nothing.

    ``single`` remembers whether the layer returned a bare tensor.
    """

    items: tuple[Any, ...]
    single: bool = True

    @classmethod
    def none(cls) -> Tensors:
        """No tensors at all, where a dropped microbatch has none."""
        return cls((), single=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements (what has none, like the tokens that stand for tensors in a simulation, counts nothing)."""
        return sum(getattr(item, "nbytes", 0) for item in self.items)


@dataclass(frozen=True, slots=True)
class NamedTensors:
    """Tensors of one layer by name (``None``: there is no gradient), in a fixed order."""

    names: tuple[str, ...]
    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """An additive metric: ``total`` over ``count`` samples (or tokens)."""

    name: str
    total: float
    count: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlace:
    """One stop of a route: layers ``[start, stop)`` live at process ``shard``, reachable at ``address``, in ``life``."""

    start: int
    stop: int
    shard: str
    address: str
    life: int


# --- forward worker <-> first shard -------------------------------------------------------------------------------

MAX_OFFERED_BYTES = 256 << 10
"""The most tensor bytes of an offer: a shard keeps one offer of each worker that it has no room for yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What a forward worker has of a microbatch. ``dropped`` as in `Forward`: then there are no tensors."""

    inputs: Tensors
    targets: Tensors
    dropped: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return self.inputs.num_bytes + self.targets.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Worker: I hold this attempt and its data; admit it when there is room. At most one offer a link waits.

    Small ``samples`` (up to `MAX_OFFERED_BYTES`) come along, so that the pass begins as soon as there is room; larger ones follow the grant.
    """

    job: str
    attempt: Attempt
    life: int
    samples: Samples | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """First shard: admitted as ``number``; every shard of the route has a place for it. Send the tensors, unless they came with the offer."""

    job: str
    attempt: Attempt
    number: int
    life: int
    arrived: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Decline:
    """First shard: not admitted.

    ``reason``: "applied" (all layers have it), "open" (an older attempt goes on by itself), "life", "stopping", or "order" (an
    earlier microbatch must come first and nobody offers it: take that lease instead).
    """

    job: str
    attempt: Attempt
    reason: str
    life: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """First shard to the worker: the attempt's number is closed; its credit is back. ``loss`` is the mean over the samples."""

    job: str
    attempt: Attempt
    outcome: Outcome
    life: int
    loss: float | None = None


# --- along the route ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """A microbatch enters a block. ``needed_from``: the lowest layer before this block that lacks it (the number of layers when none does).

    ``dropped`` says, where it is not empty, why the microbatch is given up: there are no tensors, and a tombstone takes its place on every
    layer from here on that lacks it.
    """

    job: str
    attempt: Attempt
    number: int
    life: int
    needed_from: int
    inputs: Tensors
    targets: Tensors
    dropped: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryGradient:
    """The loss's gradient with respect to what this (upstream) block put out; all ``None`` when nothing below is trainable.

    ``dropped`` as in `Forward`: there is no gradient, and this block's layers that lack the microbatch drop it.
    """

    job: str
    attempt: Attempt
    number: int
    life: int
    gradients: Tensors
    dropped: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockClosed:
    """Upstream to the first shard: block ``block`` has applied (dropped, or aborted and freed) the attempt on all of its layers.

    The last block adds the summed loss and metrics. Counted only if ``fresh``: at least one layer took it in for the first time.
    ``missing_from`` is the block's lowest layer that dropped it; ``partial``: another layer of the block has applied it.
    """

    job: str
    attempt: Attempt
    number: int
    life: int
    block: int
    outcome: Outcome
    loss: float | None = None
    metrics: tuple[Metric, ...] = ()
    reason: str = ""
    missing_from: int | None = None
    partial: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Downstream: free what this attempt holds; answered with a `BlockClosed` whose outcome is "aborted"."""

    job: str
    attempt: Attempt
    number: int
    life: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFinite:
    """Upstream: this attempt's loss is not finite and my block's input already was not; find the first layer."""

    job: str
    attempt: Attempt
    number: int
    life: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAt:
    """Downstream: training stops at ``version``; every layer cuts there."""

    job: str
    version: int
    life: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateForward:
    """Validation samples ``[start, stop)`` run through the cut at ``version``: evaluation mode, copies of buffers, nothing kept."""

    job: str
    version: int
    start: int
    stop: int
    life: int
    inputs: Tensors
    targets: Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The last block's answer to `EvaluateForward`, relayed upstream to the worker and from it to the coordinator."""

    job: str
    version: int
    start: int
    stop: int
    loss: Metric
    life: int
    metrics: tuple[Metric, ...] = ()


# --- detached backward worker <-> shard -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRevision:
    """Which state of a layer somebody holds."""

    layer: int
    life: int
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """A layer's parameters as read whole under its shared lock."""

    layer: int
    life: int
    revision: int
    version: int
    parameters: NamedTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """Worker: send me one backward task; I hold these layer states."""

    job: str
    life: int
    have: tuple[LayerRevision, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachedTask:
    """One backward task, whole.

    It has the block's stored input, the boundary gradient (or, in the last block, the targets), the buffers that its forward
    pass read, the layers that lack it and the states that moved.
    """

    job: str
    attempt: Attempt
    number: int
    life: int
    inputs: Tensors
    targets: Tensors | None
    gradients: Tensors | None
    buffers: tuple[tuple[int, NamedTensors], ...]
    lacking: tuple[int, ...]
    input_gradient: bool
    states: tuple[LayerState, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushGradient:
    """Worker: layer ``layer``'s gradient of this attempt, computed with the parameters of ``revision`` at version ``read``."""

    job: str
    attempt: Attempt
    number: int
    layer: int
    life: int
    revision: int
    read: int
    gradients: NamedTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFinished:
    """Worker: all layers of the task are pushed; here is the block's input gradient (``None`` when not asked for)."""

    job: str
    attempt: Attempt
    number: int
    life: int
    gradients: Tensors | None


# --- everybody <-> coordinator ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosting:
    """What a process still does for a job while nobody coordinates it: ``block`` in ``life`` (-1 and 0: a forward worker).

    For a backward worker ``block`` is the one that it works for and ``life`` that block's. ``generation`` is that of the route it knows.
    """

    job: str
    block: int
    life: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A process presents itself. ``address`` is where peers reach it (empty: it accepts no links); ``device`` as in ``--device``.

    ``hosting`` names the jobs that it goes on with: it has only lost its coordinator, or that was started again. A worker that names
    a job in ``join`` takes part in that one beyond what it needs (empty: in whatever job trains); None: it takes a job's own places.
    """

    role: Role
    name: str
    address: str
    device: str
    host: str
    pid: int
    version: str
    allowed_imports: tuple[str, ...] = ()
    metrics_address: str = ""
    hosting: tuple[Hosting, ...] = ()
    join: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The coordinator knows the process now; heartbeats are due every ``heartbeat_seconds``."""

    heartbeat_seconds: float


class DismissalReason(StrEnum):
    """Why a process that came to join a job is sent away."""

    NOT_FOUND = "not-found"
    """There is no such job."""
    NOT_ALLOWED = "not-allowed"
    """The job can't use it."""
    OVER = "over"
    """The job is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dismissal:
    """Coordinator: there is nothing here for this process, and why, in one sentence. It ends; asking again is pointless."""

    reason: DismissalReason
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """I am alive. ``resident_bytes`` and ``cpu_seconds`` are the process's own; wire counters are totals since its start."""

    resident_bytes: int = 0
    cpu_seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Coordinator to a free shard: build this job's model and data, run them once, tell what they cost.

    ``peer`` at ``address`` is the shard that will come after it (empty: there is none): measure what a hop to it takes.
    """

    job: str
    spec_json: str
    peer: str = ""
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The answer: a profile document (`layerwise.profile.Profile`), or the sentence that says why there is none."""

    job: str
    profile_json: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """Shard to shard: a payload of one activation's size, to be answered at once."""

    job: str
    round: int
    payload: Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Echoed:
    """The answer to an `Echo`."""

    job: str
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How training goes on after it diverged and was rolled back to ``version`` (-1: it never was).

    Learning rates are ``rate_factor`` times what the schedule says. Up to version ``synchronous_until`` an update begins when the one
    before it is on all layers. A layer restored at ``version`` itself forgets the moments of its optimizer.
    """

    version: int = -1
    rate_factor: float = 1.0
    synchronous_until: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbySource:
    """Where a block's layers are to be fetched from that a lost shard has left with another one (no ``holder``: from a cut).

    ``life`` is the one in which they were copied.
    """

    holder: str = ""
    address: str = ""
    life: int = 0
    files: tuple[LayerFile, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Coordinator to a process: take part in a job.

    ``block`` is the index into ``route`` for a shard (for a backward worker: the block it works for), -1 for a forward worker.
    ``cut`` is the version to restore (0: the initial weights), from a cut unless ``standby`` says where else. ``directory`` is where cuts and
    event logs go.
    ``generation`` counts the routes of the job: every admission number and every attempt of this one is above those of the routes before.
    ``rollbacks_json``: what was rolled back so far (a list, empty: nothing), for the job's directory to remember.
    """

    job: str
    spec_json: str
    settings_json: str
    profile_json: str
    route: tuple[BlockPlace, ...]
    block: int
    cut: int
    directory: str
    generation: int
    course: Course = Course()
    rollbacks_json: str = ""
    standby: StandbySource = StandbySource()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reroute:
    """Coordinator to a process that keeps what it has: the job goes on over ``route``.

    It aborts what was under way, forgets its leases, connects anew and answers `Ready`. A shard tells again of its cuts from ``durable``, the
    newest durable version, on.
    """

    job: str
    route: tuple[BlockPlace, ...]
    block: int
    generation: int
    durable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedAttempt:
    """An attempt at a microbatch that is given up, and why."""

    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The assignment (or the new route) of ``generation`` is carried out.

    A shard tells which microbatches each of its layers already has, as JSON of `AppliedSet`, the version it has restored, and why it has
    dropped what it dropped since.
    """

    job: str
    block: int
    generation: int
    applied_json: tuple[str, ...] = ()
    version: int = 0
    drops: tuple[DroppedAttempt, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """Coordinator to a shard that is ready: only these work for its block, from now on.

    They are the backward workers of the block and, for the first one, the forward workers of the job.
    """

    job: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown:
    """Shard: my link to ``peer``, a neighbour on the route of ``generation``, is gone, so nothing passes between us."""

    job: str
    peer: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartTraining:
    """Coordinator to the first shard, once all are ready: ``done_json`` is the `AppliedSet` of microbatches that every layer has.

    ``held_json`` is the `AppliedSet` of those that at least one layer has (empty: the same): a stop must complete them all.
    """

    job: str
    done_json: str
    held_json: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unassign:
    """Coordinator: leave the job; nothing of it is kept. Answered with `Unassigned`."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unassigned:
    """The process is free again."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A role: the job can't go on, and why, in one sentence. ``cut`` names the version of a cut that can't be restored (0: it is not that).

    ``diverged``: training itself is at fault, seen by a block in this life (0: it is not that). ``standby``: the standby copy of this
    version could not be had (0: it is not that). ``memory``: the process has run out of memory and ends; others take its place.
    """

    job: str
    message: str
    cut: int = 0
    diverged: int = 0
    standby: int = 0
    memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """Forward worker: I can hold up to ``count`` leases in all (those I have included)."""

    job: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Coordinator: these attempts are yours until they close, or until you are gone. Evaluation leases name the cut.

    ``drops`` are leased like ``attempts``, but not loaded: they go through the route as drops. What is ``urgent`` comes
    before all that is not, wherever it is in the plan: training may wait for it.
    """

    job: str
    kind: LeaseKind
    attempts: tuple[Attempt, ...] = ()
    version: int = 0
    ranges: tuple[Microbatch, ...] = ()
    drops: tuple[DroppedAttempt, ...] = ()
    urgent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Coordinator to a forward worker: give back the leases that you have not begun to load ("recalled")."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReturn:
    """Worker: I no longer work on this attempt (``reason`` as in `Decline`, "recalled", or "load-failed: ...")."""

    job: str
    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptClosed:
    """One closed number, for the coordinator's sample ledger.

    ``missing_from``: the lowest layer that dropped the microbatch, where others have applied it (``None``: all layers agree).
    """

    attempt: Attempt
    number: int
    outcome: Outcome
    loss: float | None = None
    metrics: tuple[Metric, ...] = ()
    reason: str = ""
    missing_from: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptsClosed:
    """First shard: these numbers are closed. ``active_seconds``: first admission to last close, on its own clock."""

    job: str
    closed: tuple[AttemptClosed, ...]
    active_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTaken:
    """A block's layers are all copied at ``version`` (in memory)."""

    job: str
    block: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFile:
    """One layer's file in a cut: its name inside the cut's folder, its size and the hash of its bytes."""

    layer: int
    life: int
    name: str
    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CutSaved:
    """A block's files of the cut are on disk, synced and renamed; or, with ``error``, they are not and training goes on."""

    job: str
    block: int
    version: int
    files: tuple[LayerFile, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitCut:
    """Coordinator to the first shard: all blocks are saved; write the manifest, then answer `CutCommitted`. ``keep``: delete older ones."""

    job: str
    version: int
    files: tuple[LayerFile, ...]
    manifest_json: str
    keep: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CutCommitted:
    """The cut is durable: its manifest is on disk. With ``error``: it is not."""

    job: str
    version: int
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutDurable:
    """Coordinator to the first shard: cuts up to ``version`` are durable (or given up); admission may pass the ones after."""

    job: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyOffer:
    """Shard to the one that keeps its copies: block ``block`` in ``life`` has copied itself at ``version``; fetch it.

    It need not, and it may leave out versions; a newer offer takes the place of one that it has not begun.
    """

    job: str
    block: int
    life: int
    version: int
    files: tuple[LayerFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyRequest:
    """Shard to shard: the next bytes of layer ``layer`` in that copy, from ``offset`` on. One request at a time is under way."""

    job: str
    block: int
    life: int
    version: int
    layer: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyPart:
    """The answer to a `StandbyRequest`; without ``data`` there is no such copy here (any more)."""

    job: str
    block: int
    life: int
    version: int
    layer: int
    offset: int
    data: Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyHeld:
    """Shard to the coordinator, and to the block's own shard: this copy is here, whole. It never counts as durable."""

    job: str
    block: int
    life: int
    version: int
    files: tuple[LayerFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseCut:
    """Coordinator to shards: copies of versions up to ``version`` may go."""

    job: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Coordinator to the first shard: fix the next update boundary, admit up to it, cut there. Answered with `Stopping`."""

    job: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """First shard: training ends at ``version``."""

    job: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """Totals of one layer, of all lives that led to its state. ``staleness[t]`` counts gradients of staleness ``t`` updates; ``misalignment`` likewise."""

    layer: int
    life: int
    version: int
    revision: int
    staleness: tuple[int, ...]
    misalignment: tuple[int, ...]
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """A shard's totals for one job; each report replaces the one before, so repeats do no harm.

    ``shortage`` says what the disk of the event log refuses at present (empty: nothing).
    """

    job: str
    block: int
    layers: tuple[LayerReport, ...]
    open_attempts: int
    store_bytes: int
    forward_queue: int
    backward_queue: int
    compute_seconds: float
    log_bytes: int
    shortage: str = ""


Message = (
    Offer | Grant | Decline | Closed | Forward | BoundaryGradient | BlockClosed | Abort | NotFinite | StopAt | EvaluateForward | Evaluated
    | TaskRequest | DetachedTask | PushGradient | TaskFinished
    | Hello | Welcome | Dismissal
    | Heartbeat | Probe | Probed | Echo | Echoed | Assignment | Reroute | Ready | Workers | LinkDown | StartTraining | Unassign | Unassigned
    | Failure
    | LeaseRequest | Lease | Recall | LeaseReturn | AttemptsClosed | CutTaken | CutSaved | CommitCut | CutCommitted | CutDurable | ReleaseCut
    | StandbyOffer | StandbyRequest | StandbyPart | StandbyHeld
    | Stop | Stopping | BlockReport
)  # fmt: skip
