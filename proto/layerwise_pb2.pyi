from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_APPLIED: _ClassVar[Outcome]
    OUTCOME_DROPPED: _ClassVar[Outcome]
    OUTCOME_ABORTED: _ClassVar[Outcome]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_COORDINATOR: _ClassVar[Role]
    ROLE_SHARD: _ClassVar[Role]
    ROLE_FORWARD: _ClassVar[Role]
    ROLE_BACKWARD: _ClassVar[Role]
    ROLE_CLIENT: _ClassVar[Role]

class LeaseKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_KIND_UNSPECIFIED: _ClassVar[LeaseKind]
    LEASE_KIND_TRAIN: _ClassVar[LeaseKind]
    LEASE_KIND_EVALUATE: _ClassVar[LeaseKind]

class DismissalReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISMISSAL_REASON_UNSPECIFIED: _ClassVar[DismissalReason]
    DISMISSAL_REASON_NOT_FOUND: _ClassVar[DismissalReason]
    DISMISSAL_REASON_NOT_ALLOWED: _ClassVar[DismissalReason]
    DISMISSAL_REASON_OVER: _ClassVar[DismissalReason]
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_APPLIED: Outcome
OUTCOME_DROPPED: Outcome
OUTCOME_ABORTED: Outcome
ROLE_UNSPECIFIED: Role
ROLE_COORDINATOR: Role
ROLE_SHARD: Role
ROLE_FORWARD: Role
ROLE_BACKWARD: Role
ROLE_CLIENT: Role
LEASE_KIND_UNSPECIFIED: LeaseKind
LEASE_KIND_TRAIN: LeaseKind
LEASE_KIND_EVALUATE: LeaseKind
DISMISSAL_REASON_UNSPECIFIED: DismissalReason
DISMISSAL_REASON_NOT_FOUND: DismissalReason
DISMISSAL_REASON_NOT_ALLOWED: DismissalReason
DISMISSAL_REASON_OVER: DismissalReason

class Frame(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: FrameHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[FrameHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("wire_version", "sender", "receiver", "acknowledged", "name", "lost", "packets", "payload_sequence", "payload_offset", "answer")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    PACKETS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    sender: int
    receiver: int
    acknowledged: int
    name: str
    lost: str
    packets: _containers.RepeatedCompositeFieldContainer[Packet]
    payload_sequence: int
    payload_offset: int
    answer: bool
    def __init__(self, wire_version: _Optional[int] = ..., sender: _Optional[int] = ..., receiver: _Optional[int] = ..., acknowledged: _Optional[int] = ..., name: _Optional[str] = ..., lost: _Optional[str] = ..., packets: _Optional[_Iterable[_Union[Packet, _Mapping]]] = ..., payload_sequence: _Optional[int] = ..., payload_offset: _Optional[int] = ..., answer: _Optional[bool] = ...) -> None: ...

class Packet(_message.Message):
    __slots__ = ("sequence", "envelope", "payload_bytes")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    envelope: Envelope
    payload_bytes: int
    def __init__(self, sequence: _Optional[int] = ..., envelope: _Optional[_Union[Envelope, _Mapping]] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("offer", "grant", "decline", "closed", "forward", "boundary_gradient", "block_closed", "abort", "not_finite", "stop_at", "evaluate_forward", "evaluated", "task_request", "detached_task", "push_gradient", "task_finished", "hello", "welcome", "heartbeat", "probe", "probed", "assignment", "ready", "start_training", "unassign", "unassigned", "failure", "lease_request", "lease", "lease_return", "attempts_closed", "cut_taken", "cut_saved", "commit_cut", "cut_committed", "cut_durable", "release_cut", "stop", "stopping", "block_report", "echo", "echoed", "reroute", "link_down", "recall", "workers", "standby_offer", "standby_request", "standby_part", "standby_held", "dismissal")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    DECLINE_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BOUNDARY_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_CLOSED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    NOT_FINITE_FIELD_NUMBER: _ClassVar[int]
    STOP_AT_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FORWARD_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    TASK_REQUEST_FIELD_NUMBER: _ClassVar[int]
    DETACHED_TASK_FIELD_NUMBER: _ClassVar[int]
    PUSH_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    TASK_FINISHED_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    PROBED_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    START_TRAINING_FIELD_NUMBER: _ClassVar[int]
    UNASSIGN_FIELD_NUMBER: _ClassVar[int]
    UNASSIGNED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LEASE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LEASE_RETURN_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_CLOSED_FIELD_NUMBER: _ClassVar[int]
    CUT_TAKEN_FIELD_NUMBER: _ClassVar[int]
    CUT_SAVED_FIELD_NUMBER: _ClassVar[int]
    COMMIT_CUT_FIELD_NUMBER: _ClassVar[int]
    CUT_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    CUT_DURABLE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_CUT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_REPORT_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    ECHOED_FIELD_NUMBER: _ClassVar[int]
    REROUTE_FIELD_NUMBER: _ClassVar[int]
    LINK_DOWN_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    STANDBY_OFFER_FIELD_NUMBER: _ClassVar[int]
    STANDBY_REQUEST_FIELD_NUMBER: _ClassVar[int]
    STANDBY_PART_FIELD_NUMBER: _ClassVar[int]
    STANDBY_HELD_FIELD_NUMBER: _ClassVar[int]
    DISMISSAL_FIELD_NUMBER: _ClassVar[int]
    offer: Offer
    grant: Grant
    decline: Decline
    closed: Closed
    forward: Forward
    boundary_gradient: BoundaryGradient
    block_closed: BlockClosed
    abort: Abort
    not_finite: NotFinite
    stop_at: StopAt
    evaluate_forward: EvaluateForward
    evaluated: Evaluated
    task_request: TaskRequest
    detached_task: DetachedTask
    push_gradient: PushGradient
    task_finished: TaskFinished
    hello: Hello
    welcome: Welcome
    heartbeat: Heartbeat
    probe: Probe
    probed: Probed
    assignment: Assignment
    ready: Ready
    start_training: StartTraining
    unassign: Unassign
    unassigned: Unassigned
    failure: Failure
    lease_request: LeaseRequest
    lease: Lease
    lease_return: LeaseReturn
    attempts_closed: AttemptsClosed
    cut_taken: CutTaken
    cut_saved: CutSaved
    commit_cut: CommitCut
    cut_committed: CutCommitted
    cut_durable: CutDurable
    release_cut: ReleaseCut
    stop: Stop
    stopping: Stopping
    block_report: BlockReport
    echo: Echo
    echoed: Echoed
    reroute: Reroute
    link_down: LinkDown
    recall: Recall
    workers: Workers
    standby_offer: StandbyOffer
    standby_request: StandbyRequest
    standby_part: StandbyPart
    standby_held: StandbyHeld
    dismissal: Dismissal
    def __init__(self, offer: _Optional[_Union[Offer, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., decline: _Optional[_Union[Decline, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., boundary_gradient: _Optional[_Union[BoundaryGradient, _Mapping]] = ..., block_closed: _Optional[_Union[BlockClosed, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., not_finite: _Optional[_Union[NotFinite, _Mapping]] = ..., stop_at: _Optional[_Union[StopAt, _Mapping]] = ..., evaluate_forward: _Optional[_Union[EvaluateForward, _Mapping]] = ..., evaluated: _Optional[_Union[Evaluated, _Mapping]] = ..., task_request: _Optional[_Union[TaskRequest, _Mapping]] = ..., detached_task: _Optional[_Union[DetachedTask, _Mapping]] = ..., push_gradient: _Optional[_Union[PushGradient, _Mapping]] = ..., task_finished: _Optional[_Union[TaskFinished, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., probed: _Optional[_Union[Probed, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., start_training: _Optional[_Union[StartTraining, _Mapping]] = ..., unassign: _Optional[_Union[Unassign, _Mapping]] = ..., unassigned: _Optional[_Union[Unassigned, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., lease_request: _Optional[_Union[LeaseRequest, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., lease_return: _Optional[_Union[LeaseReturn, _Mapping]] = ..., attempts_closed: _Optional[_Union[AttemptsClosed, _Mapping]] = ..., cut_taken: _Optional[_Union[CutTaken, _Mapping]] = ..., cut_saved: _Optional[_Union[CutSaved, _Mapping]] = ..., commit_cut: _Optional[_Union[CommitCut, _Mapping]] = ..., cut_committed: _Optional[_Union[CutCommitted, _Mapping]] = ..., cut_durable: _Optional[_Union[CutDurable, _Mapping]] = ..., release_cut: _Optional[_Union[ReleaseCut, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., stopping: _Optional[_Union[Stopping, _Mapping]] = ..., block_report: _Optional[_Union[BlockReport, _Mapping]] = ..., echo: _Optional[_Union[Echo, _Mapping]] = ..., echoed: _Optional[_Union[Echoed, _Mapping]] = ..., reroute: _Optional[_Union[Reroute, _Mapping]] = ..., link_down: _Optional[_Union[LinkDown, _Mapping]] = ..., recall: _Optional[_Union[Recall, _Mapping]] = ..., workers: _Optional[_Union[Workers, _Mapping]] = ..., standby_offer: _Optional[_Union[StandbyOffer, _Mapping]] = ..., standby_request: _Optional[_Union[StandbyRequest, _Mapping]] = ..., standby_part: _Optional[_Union[StandbyPart, _Mapping]] = ..., standby_held: _Optional[_Union[StandbyHeld, _Mapping]] = ..., dismissal: _Optional[_Union[Dismissal, _Mapping]] = ...) -> None: ...

class TensorHeader(_message.Message):
    __slots__ = ("dtype", "shape", "strides", "num_bytes", "absent")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STRIDES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    strides: _containers.RepeatedScalarFieldContainer[int]
    num_bytes: int
    absent: bool
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., strides: _Optional[_Iterable[int]] = ..., num_bytes: _Optional[int] = ..., absent: _Optional[bool] = ...) -> None: ...

class Tensors(_message.Message):
    __slots__ = ("items", "single")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    SINGLE_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[TensorHeader]
    single: bool
    def __init__(self, items: _Optional[_Iterable[_Union[TensorHeader, _Mapping]]] = ..., single: _Optional[bool] = ...) -> None: ...

class NamedTensors(_message.Message):
    __slots__ = ("names", "items")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    items: _containers.RepeatedCompositeFieldContainer[TensorHeader]
    def __init__(self, names: _Optional[_Iterable[str]] = ..., items: _Optional[_Iterable[_Union[TensorHeader, _Mapping]]] = ...) -> None: ...

class LayerTensors(_message.Message):
    __slots__ = ("layer", "tensors")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    tensors: NamedTensors
    def __init__(self, layer: _Optional[int] = ..., tensors: _Optional[_Union[NamedTensors, _Mapping]] = ...) -> None: ...

class Microbatch(_message.Message):
    __slots__ = ("epoch", "start", "stop")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    start: int
    stop: int
    def __init__(self, epoch: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Attempt(_message.Message):
    __slots__ = ("microbatch", "attempt")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    microbatch: Microbatch
    attempt: int
    def __init__(self, microbatch: _Optional[_Union[Microbatch, _Mapping]] = ..., attempt: _Optional[int] = ...) -> None: ...

class Metric(_message.Message):
    __slots__ = ("name", "total", "count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    total: float
    count: float
    def __init__(self, name: _Optional[str] = ..., total: _Optional[float] = ..., count: _Optional[float] = ...) -> None: ...

class BlockPlace(_message.Message):
    __slots__ = ("start", "stop", "shard", "address", "life")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    shard: str
    address: str
    life: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ..., shard: _Optional[str] = ..., address: _Optional[str] = ..., life: _Optional[int] = ...) -> None: ...

class Samples(_message.Message):
    __slots__ = ("inputs", "targets", "dropped")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    inputs: Tensors
    targets: Tensors
    dropped: str
    def __init__(self, inputs: _Optional[_Union[Tensors, _Mapping]] = ..., targets: _Optional[_Union[Tensors, _Mapping]] = ..., dropped: _Optional[str] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("job", "attempt", "life", "samples")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    life: int
    samples: Samples
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., life: _Optional[int] = ..., samples: _Optional[_Union[Samples, _Mapping]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("job", "attempt", "number", "life", "arrived")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    number: int
    life: int
    arrived: bool
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., life: _Optional[int] = ..., arrived: _Optional[bool] = ...) -> None: ...

class Decline(_message.Message):
    __slots__ = ("job", "attempt", "reason", "life")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    reason: str
    life: int
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., reason: _Optional[str] = ..., life: _Optional[int] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("job", "attempt", "outcome", "loss", "life")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    outcome: Outcome
    loss: float
    life: int
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., loss: _Optional[float] = ..., life: _Optional[int] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("job", "attempt", "number", "life", "needed_from", "inputs", "targets", "dropped")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    NEEDED_FROM_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    number: int
    life: int
    needed_from: int
    inputs: Tensors
    targets: Tensors
    dropped: str
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., life: _Optional[int] = ..., needed_from: _Optional[int] = ..., inputs: _Optional[_Union[Tensors, _Mapping]] = ..., targets: _Optional[_Union[Tensors, _Mapping]] = ..., dropped: _Optional[str] = ...) -> None: ...

class BoundaryGradient(_message.Message):
    __slots__ = ("job", "attempt", "number", "life", "gradients", "dropped")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    number: int
    life: int
    gradients: Tensors
    dropped: str
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., life: _Optional[int] = ..., gradients: _Optional[_Union[Tensors, _Mapping]] = ..., dropped: _Optional[str] = ...) -> None: ...

class BlockClosed(_message.Message):
    __slots__ = ("job", "attempt", "number", "life", "block", "outcome", "loss", "metrics", "reason", "missing_from", "partial")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MISSING_FROM_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    number: int
    life: int
    block: int
    outcome: Outcome
    loss: float
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    reason: str
    missing_from: int
    partial: bool
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., life: _Optional[int] = ..., block: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., loss: _Optional[float] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., reason: _Optional[str] = ..., missing_from: _Optional[int] = ..., partial: _Optional[bool] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("job", "attempt", "number", "life")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    number: int
    life: int
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., life: _Optional[int] = ...) -> None: ...

class NotFinite(_message.Message):
    __slots__ = ("job", "attempt", "number", "life")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    number: int
    life: int
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., life: _Optional[int] = ...) -> None: ...

class StopAt(_message.Message):
    __slots__ = ("job", "version", "life")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    life: int
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ..., life: _Optional[int] = ...) -> None: ...

class EvaluateForward(_message.Message):
    __slots__ = ("job", "version", "start", "stop", "life", "inputs", "targets")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    start: int
    stop: int
    life: int
    inputs: Tensors
    targets: Tensors
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., life: _Optional[int] = ..., inputs: _Optional[_Union[Tensors, _Mapping]] = ..., targets: _Optional[_Union[Tensors, _Mapping]] = ...) -> None: ...

class Evaluated(_message.Message):
    __slots__ = ("job", "version", "start", "stop", "loss", "metrics", "life")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    start: int
    stop: int
    loss: Metric
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    life: int
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., loss: _Optional[_Union[Metric, _Mapping]] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., life: _Optional[int] = ...) -> None: ...

class LayerRevision(_message.Message):
    __slots__ = ("layer", "life", "revision")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    layer: int
    life: int
    revision: int
    def __init__(self, layer: _Optional[int] = ..., life: _Optional[int] = ..., revision: _Optional[int] = ...) -> None: ...

class LayerState(_message.Message):
    __slots__ = ("layer", "life", "revision", "version", "parameters")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    life: int
    revision: int
    version: int
    parameters: NamedTensors
    def __init__(self, layer: _Optional[int] = ..., life: _Optional[int] = ..., revision: _Optional[int] = ..., version: _Optional[int] = ..., parameters: _Optional[_Union[NamedTensors, _Mapping]] = ...) -> None: ...

class TaskRequest(_message.Message):
    __slots__ = ("job", "life", "have")
    JOB_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    job: str
    life: int
    have: _containers.RepeatedCompositeFieldContainer[LayerRevision]
    def __init__(self, job: _Optional[str] = ..., life: _Optional[int] = ..., have: _Optional[_Iterable[_Union[LayerRevision, _Mapping]]] = ...) -> None: ...

class DetachedTask(_message.Message):
    __slots__ = ("job", "attempt", "number", "life", "inputs", "targets", "gradients", "buffers", "lacking", "input_gradient", "states")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    LACKING_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    number: int
    life: int
    inputs: Tensors
    targets: Tensors
    gradients: Tensors
    buffers: _containers.RepeatedCompositeFieldContainer[LayerTensors]
    lacking: _containers.RepeatedScalarFieldContainer[int]
    input_gradient: bool
    states: _containers.RepeatedCompositeFieldContainer[LayerState]
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., life: _Optional[int] = ..., inputs: _Optional[_Union[Tensors, _Mapping]] = ..., targets: _Optional[_Union[Tensors, _Mapping]] = ..., gradients: _Optional[_Union[Tensors, _Mapping]] = ..., buffers: _Optional[_Iterable[_Union[LayerTensors, _Mapping]]] = ..., lacking: _Optional[_Iterable[int]] = ..., input_gradient: _Optional[bool] = ..., states: _Optional[_Iterable[_Union[LayerState, _Mapping]]] = ...) -> None: ...

class PushGradient(_message.Message):
    __slots__ = ("job", "attempt", "number", "layer", "life", "revision", "read", "gradients")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    number: int
    layer: int
    life: int
    revision: int
    read: int
    gradients: NamedTensors
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., layer: _Optional[int] = ..., life: _Optional[int] = ..., revision: _Optional[int] = ..., read: _Optional[int] = ..., gradients: _Optional[_Union[NamedTensors, _Mapping]] = ...) -> None: ...

class TaskFinished(_message.Message):
    __slots__ = ("job", "attempt", "number", "life", "gradients")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    number: int
    life: int
    gradients: Tensors
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., life: _Optional[int] = ..., gradients: _Optional[_Union[Tensors, _Mapping]] = ...) -> None: ...

class Hosting(_message.Message):
    __slots__ = ("job", "block", "life", "generation")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    job: str
    block: int
    life: int
    generation: int
    def __init__(self, job: _Optional[str] = ..., block: _Optional[int] = ..., life: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("role", "name", "address", "device", "host", "pid", "version", "allowed_imports", "metrics_address", "hosting", "join")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_IMPORTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOSTING_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    role: Role
    name: str
    address: str
    device: str
    host: str
    pid: int
    version: str
    allowed_imports: _containers.RepeatedScalarFieldContainer[str]
    metrics_address: str
    hosting: _containers.RepeatedCompositeFieldContainer[Hosting]
    join: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., version: _Optional[str] = ..., allowed_imports: _Optional[_Iterable[str]] = ..., metrics_address: _Optional[str] = ..., hosting: _Optional[_Iterable[_Union[Hosting, _Mapping]]] = ..., join: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("heartbeat_seconds",)
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    heartbeat_seconds: float
    def __init__(self, heartbeat_seconds: _Optional[float] = ...) -> None: ...

class Dismissal(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: DismissalReason
    message: str
    def __init__(self, reason: _Optional[_Union[DismissalReason, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("resident_bytes", "cpu_seconds", "sent_bytes", "received_bytes")
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    resident_bytes: int
    cpu_seconds: float
    sent_bytes: int
    received_bytes: int
    def __init__(self, resident_bytes: _Optional[int] = ..., cpu_seconds: _Optional[float] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("job", "spec_json", "peer", "address")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    job: str
    spec_json: str
    peer: str
    address: str
    def __init__(self, job: _Optional[str] = ..., spec_json: _Optional[str] = ..., peer: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Echo(_message.Message):
    __slots__ = ("job", "round", "payload")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    job: str
    round: int
    payload: Tensors
    def __init__(self, job: _Optional[str] = ..., round: _Optional[int] = ..., payload: _Optional[_Union[Tensors, _Mapping]] = ...) -> None: ...

class Echoed(_message.Message):
    __slots__ = ("job", "round")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    job: str
    round: int
    def __init__(self, job: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

class Probed(_message.Message):
    __slots__ = ("job", "profile_json", "error")
    JOB_FIELD_NUMBER: _ClassVar[int]
    PROFILE_JSON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    job: str
    profile_json: str
    error: str
    def __init__(self, job: _Optional[str] = ..., profile_json: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class Course(_message.Message):
    __slots__ = ("version", "rate_factor", "synchronous_until")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RATE_FACTOR_FIELD_NUMBER: _ClassVar[int]
    SYNCHRONOUS_UNTIL_FIELD_NUMBER: _ClassVar[int]
    version: int
    rate_factor: float
    synchronous_until: int
    def __init__(self, version: _Optional[int] = ..., rate_factor: _Optional[float] = ..., synchronous_until: _Optional[int] = ...) -> None: ...

class StandbySource(_message.Message):
    __slots__ = ("holder", "address", "life", "files")
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    holder: str
    address: str
    life: int
    files: _containers.RepeatedCompositeFieldContainer[LayerFile]
    def __init__(self, holder: _Optional[str] = ..., address: _Optional[str] = ..., life: _Optional[int] = ..., files: _Optional[_Iterable[_Union[LayerFile, _Mapping]]] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("job", "spec_json", "settings_json", "profile_json", "route", "block", "cut", "directory", "generation", "course", "rollbacks_json", "standby")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    PROFILE_JSON_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COURSE_FIELD_NUMBER: _ClassVar[int]
    ROLLBACKS_JSON_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    job: str
    spec_json: str
    settings_json: str
    profile_json: str
    route: _containers.RepeatedCompositeFieldContainer[BlockPlace]
    block: int
    cut: int
    directory: str
    generation: int
    course: Course
    rollbacks_json: str
    standby: StandbySource
    def __init__(self, job: _Optional[str] = ..., spec_json: _Optional[str] = ..., settings_json: _Optional[str] = ..., profile_json: _Optional[str] = ..., route: _Optional[_Iterable[_Union[BlockPlace, _Mapping]]] = ..., block: _Optional[int] = ..., cut: _Optional[int] = ..., directory: _Optional[str] = ..., generation: _Optional[int] = ..., course: _Optional[_Union[Course, _Mapping]] = ..., rollbacks_json: _Optional[str] = ..., standby: _Optional[_Union[StandbySource, _Mapping]] = ...) -> None: ...

class Reroute(_message.Message):
    __slots__ = ("job", "route", "block", "generation", "durable")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    job: str
    route: _containers.RepeatedCompositeFieldContainer[BlockPlace]
    block: int
    generation: int
    durable: int
    def __init__(self, job: _Optional[str] = ..., route: _Optional[_Iterable[_Union[BlockPlace, _Mapping]]] = ..., block: _Optional[int] = ..., generation: _Optional[int] = ..., durable: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("job", "block", "applied_json", "version", "generation", "drops")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    APPLIED_JSON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    job: str
    block: int
    applied_json: _containers.RepeatedScalarFieldContainer[str]
    version: int
    generation: int
    drops: _containers.RepeatedCompositeFieldContainer[DroppedAttempt]
    def __init__(self, job: _Optional[str] = ..., block: _Optional[int] = ..., applied_json: _Optional[_Iterable[str]] = ..., version: _Optional[int] = ..., generation: _Optional[int] = ..., drops: _Optional[_Iterable[_Union[DroppedAttempt, _Mapping]]] = ...) -> None: ...

class Workers(_message.Message):
    __slots__ = ("job", "names")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    job: str
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class LinkDown(_message.Message):
    __slots__ = ("job", "peer", "generation")
    JOB_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    job: str
    peer: str
    generation: int
    def __init__(self, job: _Optional[str] = ..., peer: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class StartTraining(_message.Message):
    __slots__ = ("job", "done_json", "held_json")
    JOB_FIELD_NUMBER: _ClassVar[int]
    DONE_JSON_FIELD_NUMBER: _ClassVar[int]
    HELD_JSON_FIELD_NUMBER: _ClassVar[int]
    job: str
    done_json: str
    held_json: str
    def __init__(self, job: _Optional[str] = ..., done_json: _Optional[str] = ..., held_json: _Optional[str] = ...) -> None: ...

class Unassign(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class Unassigned(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("job", "message", "cut", "diverged", "standby", "memory")
    JOB_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    DIVERGED_FIELD_NUMBER: _ClassVar[int]
    STANDBY_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    job: str
    message: str
    cut: int
    diverged: int
    standby: int
    memory: bool
    def __init__(self, job: _Optional[str] = ..., message: _Optional[str] = ..., cut: _Optional[int] = ..., diverged: _Optional[int] = ..., standby: _Optional[int] = ..., memory: _Optional[bool] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("job", "count")
    JOB_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    job: str
    count: int
    def __init__(self, job: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class DroppedAttempt(_message.Message):
    __slots__ = ("attempt", "reason")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attempt: Attempt
    reason: str
    def __init__(self, attempt: _Optional[_Union[Attempt, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("job", "kind", "attempts", "version", "ranges", "drops", "urgent")
    JOB_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    URGENT_FIELD_NUMBER: _ClassVar[int]
    job: str
    kind: LeaseKind
    attempts: _containers.RepeatedCompositeFieldContainer[Attempt]
    version: int
    ranges: _containers.RepeatedCompositeFieldContainer[Microbatch]
    drops: _containers.RepeatedCompositeFieldContainer[DroppedAttempt]
    urgent: bool
    def __init__(self, job: _Optional[str] = ..., kind: _Optional[_Union[LeaseKind, str]] = ..., attempts: _Optional[_Iterable[_Union[Attempt, _Mapping]]] = ..., version: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[Microbatch, _Mapping]]] = ..., drops: _Optional[_Iterable[_Union[DroppedAttempt, _Mapping]]] = ..., urgent: _Optional[bool] = ...) -> None: ...

class Recall(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class LeaseReturn(_message.Message):
    __slots__ = ("job", "attempt", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: Attempt
    reason: str
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[_Union[Attempt, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class AttemptClosed(_message.Message):
    __slots__ = ("attempt", "number", "outcome", "loss", "metrics", "reason", "missing_from")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MISSING_FROM_FIELD_NUMBER: _ClassVar[int]
    attempt: Attempt
    number: int
    outcome: Outcome
    loss: float
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    reason: str
    missing_from: int
    def __init__(self, attempt: _Optional[_Union[Attempt, _Mapping]] = ..., number: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., loss: _Optional[float] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., reason: _Optional[str] = ..., missing_from: _Optional[int] = ...) -> None: ...

class AttemptsClosed(_message.Message):
    __slots__ = ("job", "closed", "active_seconds")
    JOB_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    job: str
    closed: _containers.RepeatedCompositeFieldContainer[AttemptClosed]
    active_seconds: float
    def __init__(self, job: _Optional[str] = ..., closed: _Optional[_Iterable[_Union[AttemptClosed, _Mapping]]] = ..., active_seconds: _Optional[float] = ...) -> None: ...

class CutTaken(_message.Message):
    __slots__ = ("job", "block", "version")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job: str
    block: int
    version: int
    def __init__(self, job: _Optional[str] = ..., block: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class LayerFile(_message.Message):
    __slots__ = ("layer", "life", "name", "num_bytes", "digest")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    layer: int
    life: int
    name: str
    num_bytes: int
    digest: str
    def __init__(self, layer: _Optional[int] = ..., life: _Optional[int] = ..., name: _Optional[str] = ..., num_bytes: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class CutSaved(_message.Message):
    __slots__ = ("job", "block", "version", "files", "error")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    job: str
    block: int
    version: int
    files: _containers.RepeatedCompositeFieldContainer[LayerFile]
    error: str
    def __init__(self, job: _Optional[str] = ..., block: _Optional[int] = ..., version: _Optional[int] = ..., files: _Optional[_Iterable[_Union[LayerFile, _Mapping]]] = ..., error: _Optional[str] = ...) -> None: ...

class CommitCut(_message.Message):
    __slots__ = ("job", "version", "files", "manifest_json", "keep")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    files: _containers.RepeatedCompositeFieldContainer[LayerFile]
    manifest_json: str
    keep: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ..., files: _Optional[_Iterable[_Union[LayerFile, _Mapping]]] = ..., manifest_json: _Optional[str] = ..., keep: _Optional[_Iterable[int]] = ...) -> None: ...

class CutCommitted(_message.Message):
    __slots__ = ("job", "version", "error")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    error: str
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class CutDurable(_message.Message):
    __slots__ = ("job", "version")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class StandbyOffer(_message.Message):
    __slots__ = ("job", "block", "life", "version", "files")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    job: str
    block: int
    life: int
    version: int
    files: _containers.RepeatedCompositeFieldContainer[LayerFile]
    def __init__(self, job: _Optional[str] = ..., block: _Optional[int] = ..., life: _Optional[int] = ..., version: _Optional[int] = ..., files: _Optional[_Iterable[_Union[LayerFile, _Mapping]]] = ...) -> None: ...

class StandbyRequest(_message.Message):
    __slots__ = ("job", "block", "life", "version", "layer", "offset")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    job: str
    block: int
    life: int
    version: int
    layer: int
    offset: int
    def __init__(self, job: _Optional[str] = ..., block: _Optional[int] = ..., life: _Optional[int] = ..., version: _Optional[int] = ..., layer: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class StandbyPart(_message.Message):
    __slots__ = ("job", "block", "life", "version", "layer", "offset", "data")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    job: str
    block: int
    life: int
    version: int
    layer: int
    offset: int
    data: Tensors
    def __init__(self, job: _Optional[str] = ..., block: _Optional[int] = ..., life: _Optional[int] = ..., version: _Optional[int] = ..., layer: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[_Union[Tensors, _Mapping]] = ...) -> None: ...

class StandbyHeld(_message.Message):
    __slots__ = ("job", "block", "life", "version", "files")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    job: str
    block: int
    life: int
    version: int
    files: _containers.RepeatedCompositeFieldContainer[LayerFile]
    def __init__(self, job: _Optional[str] = ..., block: _Optional[int] = ..., life: _Optional[int] = ..., version: _Optional[int] = ..., files: _Optional[_Iterable[_Union[LayerFile, _Mapping]]] = ...) -> None: ...

class ReleaseCut(_message.Message):
    __slots__ = ("job", "version")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: str
    def __init__(self, job: _Optional[str] = ...) -> None: ...

class Stopping(_message.Message):
    __slots__ = ("job", "version")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class LayerReport(_message.Message):
    __slots__ = ("layer", "life", "version", "revision", "staleness", "misalignment", "learning_rate")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    MISALIGNMENT_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    life: int
    version: int
    revision: int
    staleness: _containers.RepeatedScalarFieldContainer[int]
    misalignment: _containers.RepeatedScalarFieldContainer[int]
    learning_rate: float
    def __init__(self, layer: _Optional[int] = ..., life: _Optional[int] = ..., version: _Optional[int] = ..., revision: _Optional[int] = ..., staleness: _Optional[_Iterable[int]] = ..., misalignment: _Optional[_Iterable[int]] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class BlockReport(_message.Message):
    __slots__ = ("job", "block", "layers", "open_attempts", "store_bytes", "forward_queue", "backward_queue", "compute_seconds", "log_bytes", "shortage")
    JOB_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    OPEN_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    STORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORWARD_QUEUE_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_QUEUE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHORTAGE_FIELD_NUMBER: _ClassVar[int]
    job: str
    block: int
    layers: _containers.RepeatedCompositeFieldContainer[LayerReport]
    open_attempts: int
    store_bytes: int
    forward_queue: int
    backward_queue: int
    compute_seconds: float
    log_bytes: int
    shortage: str
    def __init__(self, job: _Optional[str] = ..., block: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[LayerReport, _Mapping]]] = ..., open_attempts: _Optional[int] = ..., store_bytes: _Optional[int] = ..., forward_queue: _Optional[int] = ..., backward_queue: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., log_bytes: _Optional[int] = ..., shortage: _Optional[str] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("wire_version", "spec_json")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    spec_json: str
    def __init__(self, wire_version: _Optional[int] = ..., spec_json: _Optional[str] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("wire_version", "offset")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    offset: int
    def __init__(self, wire_version: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class JobRequest(_message.Message):
    __slots__ = ("wire_version", "job")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    job: str
    def __init__(self, wire_version: _Optional[int] = ..., job: _Optional[str] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("wire_version", "job", "directory", "shards")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    job: str
    directory: str
    shards: int
    def __init__(self, wire_version: _Optional[int] = ..., job: _Optional[str] = ..., directory: _Optional[str] = ..., shards: _Optional[int] = ...) -> None: ...

class ListNodesRequest(_message.Message):
    __slots__ = ("wire_version",)
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    def __init__(self, wire_version: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("wire_version", "node", "undo")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    node: str
    undo: bool
    def __init__(self, wire_version: _Optional[int] = ..., node: _Optional[str] = ..., undo: _Optional[bool] = ...) -> None: ...

class FollowEventsRequest(_message.Message):
    __slots__ = ("wire_version", "job", "offset")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    job: str
    offset: int
    def __init__(self, wire_version: _Optional[int] = ..., job: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class JobReply(_message.Message):
    __slots__ = ("job_json",)
    JOB_JSON_FIELD_NUMBER: _ClassVar[int]
    job_json: str
    def __init__(self, job_json: _Optional[str] = ...) -> None: ...

class JobsReply(_message.Message):
    __slots__ = ("jobs_json", "next_offset")
    JOBS_JSON_FIELD_NUMBER: _ClassVar[int]
    NEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    jobs_json: str
    next_offset: int
    def __init__(self, jobs_json: _Optional[str] = ..., next_offset: _Optional[int] = ...) -> None: ...

class NodesReply(_message.Message):
    __slots__ = ("nodes_json",)
    NODES_JSON_FIELD_NUMBER: _ClassVar[int]
    nodes_json: str
    def __init__(self, nodes_json: _Optional[str] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("drain_json",)
    DRAIN_JSON_FIELD_NUMBER: _ClassVar[int]
    drain_json: str
    def __init__(self, drain_json: _Optional[str] = ...) -> None: ...

class EventReply(_message.Message):
    __slots__ = ("offset", "event_json")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    EVENT_JSON_FIELD_NUMBER: _ClassVar[int]
    offset: int
    event_json: str
    def __init__(self, offset: _Optional[int] = ..., event_json: _Optional[str] = ...) -> None: ...
