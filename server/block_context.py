"""Where one block stands: what all parts of its role need to know, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.messages import BlockPlace, Failure, Message
from layerwise.plan import TrainingPlan
from layerwise.refusals import Refusals, Refused
from layerwise.roles import Effect, Send, run_out
from layerwise.server.task_queue import TaskQueue
from layerwise.tasks import BlockCompute


class BlockContext:
    """Block ``block`` of ``route`` in ``job``, its neighbours, its arithmetic (``compute``) and its slots' ``queue``.

    ``generation`` is that of the route; `take_route` replaces both. ``drops_bad_samples``: a loss that is not finite costs the job
    that microbatch only.
    """

    def __init__(
        self,
        *,
        job: str,
        block: int,
        route: Sequence[BlockPlace],
        plan: TrainingPlan,
        window: int,
        compute: BlockCompute,
        queue: TaskQueue,
        layer_names: Sequence[str],
        coordinator: str,
        generation: int,
        drops_bad_samples: bool = False,
    ) -> None:
        self.job = job
        self.block = block
        self.num_blocks = len(route)
        self.num_layers = route[-1].stop
        self.plan = plan
        self.window = window
        self.compute = compute
        self.queue = queue
        self.layer_names = tuple(layer_names)
        self.coordinator = coordinator
        self.drops_bad_samples = drops_bad_samples
        self.failure: Failure | None = None
        self.workers: frozenset[str] | None = None
        """Who works for the block; ``None``: the coordinator has not told yet, and nothing is admitted before it does."""
        self.num_refused = 0
        self._refusals = Refusals()
        self.take_route(route, generation)

    def take_route(self, route: Sequence[BlockPlace], generation: int) -> None:
        """The neighbours are those of ``route`` from now on."""
        self.generation = generation
        self.place = route[self.block]
        self.upstream = route[self.block - 1] if self.block > 0 else None
        self.downstream = route[self.block + 1] if self.block + 1 < len(route) else None
        self.routed = False
        """Something has gone over the links of this route, and is lost with one of them."""

    @property
    def failed(self) -> bool:
        """The block acts on nothing any more."""
        return self.failure is not None

    @property
    def life(self) -> int:
        """The block's life."""
        return self.place.life

    def is_upstream(self, peer: str) -> bool:
        """Whether ``peer`` holds the block before."""
        return self.upstream is not None and self.upstream.shard == peer

    def is_downstream(self, peer: str) -> bool:
        """Whether ``peer`` holds the block after."""
        return self.downstream is not None and self.downstream.shard == peer

    def is_worker(self, peer: str) -> bool:
        """Whether ``peer`` may take part in the block's work."""
        return self.workers is None or peer in self.workers

    def describe(self) -> str:
        """The block's layers and shard, for sentences."""
        return f"layers {self.place.start}-{self.place.stop - 1} on shard {self.place.shard}"

    def refuse(self, peer: str, message: Message, why: str) -> list[Effect]:
        """Do nothing with a message, and say so."""
        self.num_refused += 1
        sentence = f"{type(message).__name__} from {peer} refused by {self.describe()}: {why}"
        self._refusals.add(Refused.UNEXPECTED, sentence)
        return []

    def fail(self, sentence: str, *, diverged: bool = False) -> list[Effect]:
        """The job can't go on (or must be rolled back): tell the coordinator, act on nothing more."""
        self.failure = Failure(job=self.job, message=sentence, diverged=self.life if diverged else 0)
        return [Send(self.coordinator, self.failure)]

    def run_out(self, sentence: str) -> list[Effect]:
        """Memory ran out: the block acts on nothing more, and its process ends."""
        self.failure = Failure(job=self.job, message=sentence, memory=True)
        return run_out(self.coordinator, self.job, sentence)
