"""The verb `verify`: does this set-up train *right*? Under any launcher, with all ranks, on drawn digits.

Every rank first computes the whole run alone; then all of them together, again, and with a stop in between. With
`bit_exact` all of that gives the same bits, so that the first one which differs tells step, rank and parameter. At the
end it plants the faults that it claims to find in copies of the run.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mnist_dist.checks import compare
from mnist_dist.checks.account import Account, AccountingTrainer, alone, draw_small_dataset
from mnist_dist.checks.findings import COMPARISONS, Finding, Status, find, worst
from mnist_dist.checks.plant import FAULTS, Fault
from mnist_dist.checks.rows import count_ranks, print_findings, print_row, print_verdict, write_json_verdict
from mnist_dist.config.schema import Config
from mnist_dist.data.dataset import Dataset
from mnist_dist.data.sampler import steps_per_epoch
from mnist_dist.distributed.device import tune_cpu
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.distributed.rendezvous import meet_ranks
from mnist_dist.distributed.setup import init_distributed
from mnist_dist.distributed.world import World
from mnist_dist.errors import JobError
from mnist_dist.models import MODELS, NUM_CLASSES
from mnist_dist.run import checkpoint

NUM_TRAIN, NUM_TEST = 3000, 500  # 47 steps an epoch, the last one short
EPOCHS = 2
STOP_AFTER = 30  # steps: in the middle of an epoch
PLANT_TRAIN, PLANT_TEST, PLANT_EPOCHS = 300, 100, 2  # 5 steps an epoch
THOROUGH = 6  # how many times each fault is planted with --plant


def run(options: argparse.Namespace, config: Config, env: LaunchEnv) -> int:
    """Verify with a request's seed and precision: 0, or 1 where something differs. Raises RequestError, RunError."""
    tune_cpu()
    began_s = time.monotonic()
    config = make_config(config, env.world_size)
    meeting = meet_ranks(config, env)  # collective
    with init_distributed(config, env, meeting) as world, tempfile.TemporaryDirectory(prefix="mnist-dist-") as folder:
        verifier = Verifier(config, world, Path(folder), show_progress=not options.json)
        if not options.plant:
            for model in MODELS:
                verifier.verify(model)  # collective
        verifier.plant_faults(THOROUGH if options.plant else 1)  # collective
        verdict = worst(verifier.findings)
        if world.is_main:
            verifier.print_result(time.monotonic() - began_s, as_json=options.json)
        return int(world.broadcast(verdict == Status.FAIL))  # collective


def make_config(config: Config, world_size: int) -> Config:
    """The request's seed and precision, and otherwise a short run with the bits of some ranks.

    Without bit_exact where the number of ranks is no power of two: then losses are compared, with a tolerance.
    """
    is_power = world_size & (world_size - 1) == 0
    shards = max(world_size, 2) if is_power else 0
    batch_size = max(64, world_size) if is_power else -(-64 // world_size) * world_size
    kept = {name: getattr(config, name) for name in ("seed", "precision", "timeout_s")}
    fixed = {"dataset": "synthetic", "epochs": EPOCHS, "batch_size": batch_size, "bit_exact": shards, "threads": 1}
    fixed["graph"] = "off"  # the account is kept between the parts of a step
    return Config.model_validate(fixed | kept)


class Verifier:
    """One rank's part, and on rank 0 what was found."""

    def __init__(self, config: Config, world: World, folder: Path, *, show_progress: bool) -> None:
        """`folder` is for the checkpoints of the runs."""
        self.config, self.world, self.folder, self.show_progress = config, world, folder, show_progress
        self.findings: list[Finding] = []
        self.num_runs = 0
        self.num_steps: dict[str, int] = {}
        self.noticed: list[str] = []
        self.not_here: list[str] = []
        self.tried: set[str] = set()  # comparisons that could be made
        self.is_exact = bool(config.bit_exact) and len({m.processor for m in world.members}) == 1

    def train(
        self,
        world: World,
        config: Config,
        dataset: Dataset,
        *,
        stop_after: int | None = None,
        training: bytes | None = None,
        prepare: Callable[[AccountingTrainer], None] = lambda _: None,
    ) -> Account:
        """Train, alone or together, from a checkpoint's state perhaps; this rank's account. Collective if together."""
        self.num_runs += 1
        run_dir = self.folder / str(self.num_runs)
        run_dir.mkdir()
        trainer = AccountingTrainer(config, world, dataset, run_dir, stop_after=stop_after)
        if training:
            trainer.load_state_dict(checkpoint.parse_training(training))
        prepare(trainer)
        try:
            trainer.train()
        except JobError as error:  # all ranks raise it together
            trainer.account.error = str(error)
        return trainer.account

    def print_progress(self, text: str) -> None:
        """A line about what goes on, from rank 0."""
        if self.world.is_main and self.show_progress:
            print(f"verify: {text}", file=sys.stderr, flush=True)

    def verify(self, model: str) -> None:
        """Compare runs of one network. Collective."""
        world, config = self.world, self.config.model_copy(update={"model": model})
        dataset = draw_small_dataset(NUM_TRAIN, NUM_TEST)
        self.print_progress(f"{model}: every rank by itself")
        by_itself = self.train(alone(world), config, dataset)
        if self.is_exact:
            self.findings += compare.compare_alone(world, world.gather(by_itself), model)  # collective
            self.tried.add("alone")
        self.print_progress(f"{model}: all ranks together")
        together = world.gather(self.train(world, config, dataset))  # collective
        self.findings += self.judge(together, by_itself, config, dataset)
        self.num_steps[model] = len(by_itself.steps)
        self.tried |= {"together", "images", "pace"}
        if not self.is_exact or any(account.error for account in together):
            return
        self.print_progress(f"{model}: a second time")
        again = world.gather(self.train(world, config, dataset))  # collective
        self.findings += compare.compare_runs(world, again, together, "again.differs", model)
        self.print_progress(f"{model}: stopped, saved and gone on with")
        self.train(world, config, dataset, stop_after=STOP_AFTER)  # collective
        saved = checkpoint.find(self.folder / str(self.num_runs), lambda _: None) if world.is_main else None
        training = world.broadcast(saved.training if saved else None)  # collective
        resumed = world.gather(self.train(world, config, dataset, training=training))  # collective
        self.findings += compare.compare_runs(world, resumed, together, "resumed.differs", model)
        self.tried |= {"again", "resumed"}

    def judge(self, together: Sequence[Account], by_itself: Account, config: Config, dataset: Dataset) -> list[Finding]:
        """What is wrong with what the ranks did together: beside what one did alone, and by itself."""
        world, model = self.world, config.model
        compare_with_alone = compare.compare_together if self.is_exact else compare.compare_losses
        findings = compare_with_alone(world, together, by_itself, model)
        if not findings and (error := together[0].error):
            findings = [find("run.failed", [], model=model, why=error)]
        num_images = len(dataset.train.labels)
        per_epoch = steps_per_epoch(num_images, config.batch_size)
        labels = torch.bincount(dataset.eval_split.labels, minlength=NUM_CLASSES).tolist()
        findings += compare.count_images(world, together, num_images, per_epoch, labels, model)
        return findings + compare.compare_speed(world, together, model)

    def plant_faults(self, times: int) -> None:
        """Plant each fault on one rank, at one step of a copy of a short run; see whether it is named. Collective."""
        if not self.is_exact:
            self.not_here = ["any of them (bits may differ here by right)"]
            return
        self.tried.add("planted")
        world, config = self.world, self.config.model_copy(update={"model": "mlp", "epochs": PLANT_EPOCHS})
        dataset = draw_small_dataset(PLANT_TRAIN, PLANT_TEST)
        per_epoch = steps_per_epoch(PLANT_TRAIN, config.batch_size)
        by_itself = self.train(alone(world), config, dataset)
        draws = random.Random(config.seed)
        for fault in FAULTS:
            if fault.needs_ranks and world.size == 1:
                self.not_here.append(f"{fault.words} (needs several ranks)")
                continue
            self.print_progress(f"planted: {fault.words}")
            results = []
            for _ in range(times):
                rank, step = draws.randrange(world.size), draws.randrange(per_epoch, PLANT_EPOCHS * per_epoch)
                results.append(self.plant(fault, 0 if fault.on_rank_0 else rank, step, config, dataset, by_itself))
            if all(results):
                self.noticed.append(fault.words)

    def plant(self, fault: Fault, rank: int, step: int, config: Config, dataset: Dataset, by_itself: Account) -> bool:
        """Whether one planted fault is found and the right rank named. Collective."""
        world = self.world

        def prepare(trainer: AccountingTrainer) -> None:
            if world.rank == rank:
                fault.plant(trainer, step)

        together = world.gather(self.train(world, config, dataset, prepare=prepare))  # collective
        findings = self.judge(together, by_itself, config, dataset)
        is_noticed = any(f.name in fault.findings and world.name(rank) in f.text for f in findings)
        if not is_noticed:
            instead = "; ".join(f.text for f in findings) or "nothing"
            words = {"fault": fault.words, "who": world.name(rank), "step": step, "instead": instead}
            self.findings.append(find("planted.unnoticed", [world.members[rank].host], **words))
        return is_noticed

    def print_result(self, seconds: float, *, as_json: bool) -> None:
        """Print what was found, the verdict last."""
        statuses = {
            check: worst([f for f in self.findings if f.check == check]) if check in self.tried else Status.SKIP
            for check in COMPARISONS
        }
        num_planted = len(FAULTS) - len(self.not_here) if self.is_exact else 0
        if as_json:
            details: dict[str, Any] = {"steps": self.num_steps, "noticed": self.noticed, "not_here": self.not_here}
            write_json_verdict(statuses, self.findings, seconds, details)
            return
        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        world = self.world
        ranks = count_ranks(world.size, len({member.host for member in world.members}))
        exact = f"the bits of {self.config.bit_exact} ranks" if self.is_exact else "losses within a tolerance"
        console.print(f"verify: {ranks}, {world.members[0].device}, precision {world.precision}, {exact}")
        if not self.is_exact:
            why = "the hosts' processors differ" if self.config.bit_exact else f"{world.size} is no power of two"
            console.print(f"      bits are not compared, since {why}")
        print_findings(console, self.findings)
        steps = ", ".join(f"{model} {count} steps" for model, count in self.num_steps.items())
        for check, status in statuses.items():
            if status == Status.PASS and check != "planted":
                print_row(console, status, f"{COMPARISONS[check]} ({steps})")
        noticed = ", ".join(self.noticed) or "nothing was planted"
        print_row(console, statuses["planted"], f"would it notice? {len(self.noticed)} of {num_planted}: {noticed}")
        if self.not_here:
            console.print(f"      not planted here: {', '.join(self.not_here)}")
        print_verdict(console, statuses, seconds)
        failed = worst(self.findings) == Status.FAIL
        console.print(f"next: {'mend the first row, and run this again' if failed else 'train: mnist-dist train'}")
