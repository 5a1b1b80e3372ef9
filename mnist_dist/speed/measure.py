"""The job's real step and exchange, timed on real ranks: whole, and part by part.

All that is measured is repeated in rounds, each of which measures everything once, in turn: what disturbs the machine
for a while disturbs all figures alike. The first ranks train; those that a measurement does not need wait.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mnist_dist.config.schema import Config
from mnist_dist.data.dataset import Split
from mnist_dist.data.sampler import Batch, GlobalBatchSampler
from mnist_dist.data.synthetic import draw_digits
from mnist_dist.distributed.setup import COLLECTIVE_TIMEOUT
from mnist_dist.distributed.watchdog import Phase
from mnist_dist.distributed.world import World
from mnist_dist.models import build_model, num_parameters
from mnist_dist.speed.plan import NUM_IMAGES, Case, Plan
from mnist_dist.training.cuda_graph import WARM_UP_STEPS
from mnist_dist.training.exchange import Exchange
from mnist_dist.training.train_step import TrainStep

PARTS = ("data", "forward", "backward", "exchange", "optimizer")
NUM_DRAWN = 2000  # digits that are drawn; the images are these, again and again


class LapClock:
    """Seconds since the last lap, added to the part of a step that has just ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start()

    def start(self) -> None:
        """Begin anew, with nothing added up."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last_s = read_clock(self.device)

    def lap(self, part: str) -> None:
        """End a part here."""
        now_s = read_clock(self.device)
        self.seconds[part] += now_s - self.last_s
        self.last_s = now_s


class TimedExchange(Exchange):
    """The exchange, as a part of a step."""

    def __init__(self, clock: LapClock, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.clock = clock

    def put(self, shard: int, loss: Tensor) -> Tensor:
        """As Exchange does."""
        result = super().put(shard, loss)
        self.clock.lap("exchange")
        return result

    def sum(self) -> None:
        """As Exchange does. Collective."""
        super().sum()  # collective
        self.clock.lap("exchange")


class TimedStep(TrainStep):
    """The job's step, launched kernel by kernel, with a lap of the clock after each part."""

    def __init__(self, clock: LapClock, config: Config, *arguments: Any) -> None:
        super().__init__(config.model_copy(update={"graph": "off"}), *arguments)
        self.clock, world = clock, self.world
        place: Any = {"num_shards": self.num_shards, "world_size": world.size, "group": world.group}
        self.exchange = TimedExchange(clock, self.exchange.parameters, **place, fixed_tree=bool(config.bit_exact))
        self.num_pieces = 0  # of this shard, that have been through the network: of several with micro_batch
        self.model.register_forward_pre_hook(self.enter_network)

    def __call__(self, batch: Batch) -> None:
        """As TrainStep does. Collective."""
        super().__call__(batch)  # collective
        self.clock.lap("optimizer")

    def compute_gradient(self, *arguments: Any) -> Tensor:
        """As TrainStep does."""
        self.num_pieces = 0
        loss = super().compute_gradient(*arguments)
        self.clock.lap("backward")
        return loss

    def enter_network(self, *_: Any) -> None:
        """The images are there: what came before was either the data, or the backward pass of another piece."""
        self.clock.lap("backward" if self.num_pieces else "data")
        self.num_pieces += 1

    def sum_losses(self, *arguments: Any) -> Tensor:
        """As TrainStep does; the loss counts as forward."""
        loss = super().sum_losses(*arguments)
        self.clock.lap("forward")
        return loss


class Task(ABC):
    """Something that the first ranks do again and again, and that is timed."""

    def __init__(self, name: str, world: World, threads: int) -> None:
        """`world` is that of the ranks that take part."""
        self.name, self.world, self.threads = name, world, threads

    @abstractmethod
    def work(self) -> None:
        """Do it once. Collective."""

    def run(self, num_repeats: int) -> float:
        """Do it some times, begun together; returns seconds of one. Collective."""
        if self.world.device.type == "cpu":
            torch.set_num_threads(self.threads)
        self.work()  # untimed: another task has used the caches and the threads  # collective
        self.begin_together()  # collective
        began_s = read_clock(self.world.device)
        for _ in range(num_repeats):
            self.work()  # collective
        return (read_clock(self.world.device) - began_s) / num_repeats

    def begin_together(self) -> None:
        """Wait for the ranks that take part. Collective."""
        if self.world.size > 1:
            dist.all_reduce(torch.zeros(1), group=self.world.group)


class StepTask(Task):
    """Steps of a case as `train` does them."""

    def __init__(self, case: Case, config: Config, world: World, images: Split, info: Callable[[str], None]) -> None:
        """`images` lie on this rank's device; a batch that would be cut short at the end of an epoch is left out."""
        super().__init__(str(case), world, case.threads)
        self.config = config.model_copy(update={"model": case.model, "batch_size": case.batch_size})
        num_images = NUM_IMAGES // case.batch_size * case.batch_size
        place = {"rank": world.rank, "world_size": world.size, "num_shards": self.config.num_shards(world.size)}
        self.sampler = GlobalBatchSampler(
            num_images, case.batch_size, total_steps=10**9, seed=config.seed, **place, device=world.device
        )
        self.step = self.build_step(self.config, world, images, self.sampler, lambda _: self.config.lr, info)
        self.position = 0

    def build_step(self, *arguments: Any) -> TrainStep:
        """The step that is timed."""
        return TrainStep(*arguments)

    def work(self) -> None:
        """One step. Collective."""
        self.step(self.sampler.batch(self.position))  # collective
        self.position += 1

    @property
    def is_replayed(self) -> bool:
        """Whether it is a CUDA graph that is timed."""
        return self.step.graphs is not None and bool(self.step.graphs.replays)


class PartsTask(StepTask):
    """The same steps, with the seconds of each part."""

    def build_step(self, *arguments: Any) -> TrainStep:
        """The step with laps."""
        self.clock = LapClock(self.world.device)
        return TimedStep(self.clock, *arguments)

    def begin_together(self) -> None:
        """As Task does, and start the clock. Collective."""
        super().begin_together()  # collective
        self.clock.start()


class ExchangeTask(Task):
    """The exchange of one vector, by itself."""

    def __init__(self, num_bytes: int, config: Config, world: World, threads: int) -> None:
        """`num_bytes` are those of the gradients; the vector has the loss as well, and some padding."""
        super().__init__(f"exchange of {num_bytes / 1e6:.2f} MB, {world.size} ranks", world, threads)
        place: Any = {"num_shards": 1, "world_size": world.size, "group": world.group}
        gradients = torch.zeros(num_bytes // 4, device=world.device)
        self.exchange = Exchange([gradients], **place, fixed_tree=bool(config.bit_exact))
        self.num_bytes = self.exchange.vectors.nbytes

    def work(self) -> None:
        """One exchange. Collective."""
        self.world.at(Phase.EXCHANGING)
        self.exchange.sum()  # collective


@dataclass
class Series:
    """The repetitions of one task."""

    name: str
    ranks: int  # that take part
    task: Task | None  # None on a rank that waits
    num_repeats: int = 1  # of the task's work in a repetition
    seconds: list[float] = field(default_factory=list)  # of one, for each round; on rank 0
    parts: list[dict[str, float]] = field(default_factory=list)  # the same of each part of a step


@dataclass
class Samples:
    """All that was measured; on rank 0."""

    steps: dict[Case, Series] = field(default_factory=dict)
    parts: dict[Case, Series] = field(default_factory=dict)
    exchanges: dict[tuple[int, int], Series] = field(default_factory=dict)  # by ranks and bytes of the gradients
    notes: list[str] = field(default_factory=list)  # what differs from what was asked for


class Measurement:
    """One rank's part in it."""

    def __init__(self, config: Config, world: World, plan: Plan, report: Callable[[str, int, int], None]) -> None:
        """`report` hears what is measured, how many measurements are done, and how many there are. Collective."""
        self.config, self.world, self.plan, self.report = config, world, plan, report
        self.worlds = {size: world.first(size, self.make_group(size)) for size in plan.world_sizes}  # collective
        self.samples = Samples()
        self.num_done = 0

    def make_group(self, size: int) -> dist.ProcessGroup | None:
        """The group of the first ranks; one rank, or all of them, need none of their own. Collective."""
        if size in (1, self.world.size):
            return None
        group = dist.new_group(range(size), timeout=COLLECTIVE_TIMEOUT)  # collective
        return group if isinstance(group, dist.ProcessGroup) else None  # this rank is none of them

    def run(self) -> Samples:
        """Measure everything. Collective."""
        samples, plan = self.samples, self.plan
        images = draw_images(self.world.device)
        for case in plan.cases:
            arguments = (case, self.config, self.worlds[case.ranks], images, samples.notes.append)
            samples.steps[case] = self.make_series(f"{case}", case.ranks, StepTask, *arguments)
            samples.parts[case] = self.make_series(f"{case}, parts", case.ranks, PartsTask, *arguments)
        networks = [4 * num_parameters(build_model(model, 0)) for model in plan.batch_sizes]
        for ranks in plan.world_sizes[1:]:
            for num_bytes in sorted([*networks, *plan.exchange_bytes]):
                arguments = (num_bytes, self.config, self.worlds[ranks], plan.threads)  # type: ignore[assignment]
                name = f"exchange of {num_bytes:,} bytes, {ranks} ranks"
                samples.exchanges[ranks, num_bytes] = self.make_series(name, ranks, ExchangeTask, *arguments)
        series = [one for case in plan.cases for one in (samples.steps[case], samples.parts[case])]
        series += samples.exchanges.values()
        total = len(series) * (1 + plan.num_rounds)
        for number in range(1 + plan.num_rounds):
            for one in series:
                self.report(one.name, self.num_done, total)
                self.warm_up(one) if number == 0 else self.repeat(one)  # collective
                self.num_done += 1
        samples.notes += self.world.notes
        return samples

    def make_series(self, name: str, ranks: int, build: Callable[..., Task], *arguments: Any) -> Series:
        """The series of a task, which is built on the ranks that take part."""
        return Series(name, ranks, build(*arguments) if self.world.rank < ranks else None)

    def warm_up(self, series: Series) -> None:
        """Let a task allocate and choose what it needs, and see how often it fits into a repetition. Collective."""
        if series.task:
            for _ in range(WARM_UP_STEPS + 1 if self.world.device.type == "cuda" else 1):
                series.task.work()  # collective among those that take part
            seconds = series.task.run(1)  # the same
            series.num_repeats = max(1, int(self.plan.repetition_s / max(seconds, 1e-9)))
        series.num_repeats = self.world.broadcast(series.num_repeats)  # collective

    def repeat(self, series: Series) -> None:
        """Measure a task once more. Collective."""
        if task := series.task:
            seconds = task.run(series.num_repeats)  # collective among those that take part
            if self.world.is_main:
                series.seconds.append(seconds)
                if isinstance(task, PartsTask):
                    series.parts.append({part: s / series.num_repeats for part, s in task.clock.seconds.items()})
        self.world.at(Phase.WAITING)
        self.world.gather(None)  # collective: those that have not taken part wait here


def draw_images(device: torch.device) -> Split:
    """As many images as MNIST has: drawn digits, again and again."""
    images, labels = draw_digits(NUM_DRAWN, seed=0)
    repeats = NUM_IMAGES // NUM_DRAWN
    return Split(images.repeat(repeats, 1, 1), labels.repeat(repeats)).to(device)


def read_clock(device: torch.device) -> float:
    """Seconds, once the device has done all that was launched."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
