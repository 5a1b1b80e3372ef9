"""The verb `train`: everything around the loop, in the order in which it happens.

Every rank comes through here. Rank 0 alone touches the run directory; what it finds there the others hear from it.
"""

import contextlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mnist_dist.config.schema import Config
from mnist_dist.data.dataset import Dataset, check_validation, load_dataset
from mnist_dist.data.download import fetch
from mnist_dist.data.sampler import count_steps
from mnist_dist.distributed.device import tune_cpu
from mnist_dist.distributed.launch_env import LaunchEnv
from mnist_dist.distributed.rendezvous import meet_ranks
from mnist_dist.distributed.setup import init_distributed
from mnist_dist.distributed.watchdog import Verdict
from mnist_dist.distributed.world import World
from mnist_dist.errors import (
    FINISHED,
    STOPPED,
    JobError,
    RankLostError,
    RequestError,
    RunError,
    StoppedEarlyError,
    one_line,
)
from mnist_dist.files import write_atomically
from mnist_dist.models import build_model, num_parameters
from mnist_dist.report.announce import check_record, describe, finish, say_jump, say_stopped
from mnist_dist.run import checkpoint, resume, run_dir, stop
from mnist_dist.run.checkpoint import Checkpoint
from mnist_dist.run.logger import Logger, NullLogger, warn
from mnist_dist.run.run_dir import Lock, RunDir
from mnist_dist.run.trackers import check_trackers, finish_trackers, start_trackers
from mnist_dist.training.trainer import Trainer


def train(config: Config, recipe: str, env: LaunchEnv) -> tuple[int, Path]:
    """Train, and return the exit code, FINISHED, or STOPPED on request; and the run's folder. Raises JobError."""
    tune_cpu()
    with stop.interruptible("fetching the dataset"):
        downloaded = download_once(config, env)
    try:
        with stop.interruptible("waiting for the other ranks"):
            meeting = meet_ranks(config, env)  # collective
    except RankLostError as error:
        record_early_failure(config, env, error)
        raise
    if meeting:
        meeting.watchdog.on_verdict = lambda verdict: record_early_failure(config, env, verdict)
    with ExitStack() as stack, init_distributed(config, env, meeting) as world:  # collective
        with world.shared_errors():  # collective
            if isinstance(downloaded, JobError):
                raise downloaded
            check_trackers(config.log_with)
        dataset = load_same_dataset(config, world, downloaded)  # collective
        with world.shared_errors():  # collective
            start = open_run(config, recipe, env, world, stack) if world.is_main else None
        path, saved = world.broadcast((start.run_dir.path, start.saved) if start else None)  # collective
        bits = bits_depend_on(config, world)
        logger = start.logger if start else NullLogger()
        trainer = Trainer(config, world, dataset, RunDir(path), logger, bits)
        with world.shared_errors():  # collective
            if saved:
                load_checkpoint(trainer, saved)
        if start and start.found:
            trainer.last_good = str(start.found.path)
        done = trainer.run_dir.done_step() if world.is_main else None
        if world.broadcast(done is not None and done >= trainer.total_steps):  # collective
            if world.is_main:
                trainer.run_dir.stop.unlink(missing_ok=True)
            logger.info(f"{path} is finished (step {done}); nothing to do")
            return FINISHED, path
        with world.shared_errors():  # collective
            if world.is_main:
                describe(trainer, is_resumed=bool(saved))
        if config.log_with:
            start_trackers(config, world, trainer.run_dir, logger)  # collective
        code = run_loop(trainer)  # collective
    if start and code == FINISHED:  # no rank waits for it any more
        write_report(trainer)
    return code, path


def run_loop(trainer: Trainer) -> int:
    """Train, and record how it ended; the same exit codes. Collective. Raises RunError."""
    world, logger = trainer.world, trainer.logger
    if world.watchdog:
        world.watchdog.on_verdict = lambda verdict: record_failure(logger, trainer.state.step, verdict)
        world.watchdog.stack_file = trainer.run_dir.path / f"stack-rank-{world.rank}.txt"
    try:
        stopped_by = trainer.train()  # collective
        with world.shared_errors():  # collective
            check_record(trainer)
            if world.is_main and stopped_by:
                say_stopped(trainer, stopped_by)
            elif world.is_main:
                finish(trainer)
    except RunError as error:
        record_failure(logger, trainer.state.step, error)
        logger.log_line(str(error))  # the console hears it from cli.main
        raise
    finally:
        logger.stop_progress()
    finish_trackers(world)
    return STOPPED if stopped_by else FINISHED


def record_failure(logger: NullLogger, step: int, failure: Verdict | RunError) -> None:
    """The last line of metrics.jsonl, by whose `cause` scripts decide whether to start the run again."""
    reason = failure.sentence if isinstance(failure, Verdict) else str(failure)
    logger.log_metrics("failed", step=step, cause=failure.cause, reason=reason)


def record_early_failure(config: Config, env: LaunchEnv, failure: Verdict | RunError) -> None:
    """The same of ranks that were lost before the run directory was opened: if it is there and nobody runs in it."""
    if env.rank or not (config.run_dir and config.run_dir.is_dir()):
        return
    folder = RunDir(config.run_dir)
    with contextlib.suppress(JobError, OSError):
        lock = Lock(folder)
        record_failure(Logger(folder), checkpoint.newest_step(folder.checkpoints), failure)
        lock.release()


def download_once(config: Config, env: LaunchEnv) -> str | JobError | None:
    """The dataset's name on one rank of each machine, None on the others; or the error, which is said once all joined.

    It comes before the ranks join, so that no time-out of a collective hangs over a slow download. If this rank left
    alone, the others would wait for it. Machines that share the folder take turns by a lock.
    """
    if env.local_rank and env.rank:  # a launcher need not start a local rank 0 anywhere
        return None
    try:
        return fetch(config.dataset, config.data_dir, mirror=config.mirror, missing=config.missing, say=warn)
    except StoppedEarlyError:
        raise
    except JobError as error:
        return error


def load_same_dataset(config: Config, world: World, downloaded: str | None) -> Dataset:
    """The dataset, the same one on every rank. Collective. Raises RequestError."""
    hosts = [member.host for member in world.members]
    names = world.gather(downloaded)  # collective
    here = [n for n, host in zip(names, hosts, strict=True) if n and host == hosts[world.rank]]
    name = (here or [n for n in names if n])[0]
    with world.shared_errors():  # collective
        dataset = load_dataset(name, config.data_dir, config.validation)
        if (num_images := len(dataset.train.labels)) < config.batch_size:
            raise RequestError(
                f"batch_size={config.batch_size} is more than the {num_images:,} training images of {name}; use at "
                "most that"
            )
    held = world.gather(f"{dataset.name} {dataset.fingerprint[:12]}")  # collective
    for rank, other in enumerate(held):
        if other != held[0]:
            raise RequestError(
                f"{world.name(rank)} has {other} in data_dir={config.data_dir} and {world.name(0)} has {held[0]}; run "
                "`mnist-dist fetch` on both machines, or give a data_dir that they share",
                on_every_rank=True,
            )
    return dataset


@dataclass
class Start:
    """What rank 0 holds open while it trains."""

    run_dir: RunDir
    logger: Logger
    found: Checkpoint | None  # to go on from

    @property
    def saved(self) -> bytes | None:
        """The training state to go on from."""
        return self.found.training if self.found else None


def open_run(config: Config, recipe: str, env: LaunchEnv, world: World, stack: ExitStack) -> Start:
    """Make or find the run directory, lock it until `stack` ends, and see what is in it.

    Raises RequestError, StorageError, OSError.
    """
    source = resume.find_source(config, warn)
    folder = RunDir(config.run_dir) if config.run_dir else run_dir.create(recipe)
    stack.callback(Lock(folder).release)  # where this process goes on, as a notebook's, the next run must get in
    if env.exit_code_file is None:  # our scripts, which leave such a file, do it before the ranks start
        stop.remove_stale(folder.stop)
    logger = Logger(folder)
    if world.watchdog:
        step = checkpoint.newest_step(folder.checkpoints)
        world.watchdog.on_verdict = lambda verdict: record_failure(logger, step, verdict)
    checkpoint.check_writable(folder.checkpoints)
    checkpoint.sweep(folder.checkpoints)
    return Start(folder, logger, resume.find_start(config, folder, source, logger.info))


def load_checkpoint(trainer: Trainer, data: bytes) -> None:
    """Put a checkpoint's state into the trainer, unless it is another run's. Raises RequestError."""
    saved = checkpoint.parse_training(data)
    resume.check_same_run(saved, trainer.config, trainer.dataset.identity())
    trainer.load_state_dict(saved)
    say_jump(trainer, resume.saved_config(saved))
    for line in resume.changes(saved, trainer.config):
        trainer.logger.info(f"changed since the checkpoint: {line}")
    if changed := resume.changed_bits(saved, trainer.bits):
        what = "the bits will differ from here on" if trainer.config.bit_exact else "rounding will differ from here on"
        trainer.logger.info(f"note: {'; '.join(changed)}: {what}")


def bits_depend_on(config: Config, world: World) -> dict[str, Any]:
    """What the bits of the weights depend on, beside the request."""
    return {
        "shards": config.num_shards(world.size),
        "threads": torch.get_num_threads(),
        "device": world.members[0].device,
        "processor": world.members[0].processor,
        "precision": world.precision,
        "torch": str(torch.__version__),
    }


def write_report(trainer: Trainer) -> None:
    """The run's page, where it can be written: the run has finished, and nothing here changes that. On rank 0."""
    folder, logger, evaluation = trainer.run_dir, trainer.logger, trainer.evaluation
    try:
        from mnist_dist.report.page import examine, make_page, read_run  # late: it imports matplotlib

        run = read_run(folder)
        if evaluation:
            images, split = trainer.eval_split.images, trainer.dataset.eval_name
            run.examined = examine(evaluation, images, split, trainer.state.step)
        write_atomically(folder.report, make_page([run]).encode())
    except Exception as error:  # whatever a library raises
        logger.info(f"note: {folder.report} could not be written: {one_line(error)}")
    else:
        logger.info(f"report in {folder.report}")


def plan(config: Config, world_size: int) -> str:
    """What a start with this configuration would do, for `--dry-run`. Joins nobody, fetches and writes nothing."""
    num_images = {"emnist-digits": 240_000}.get(config.dataset, 60_000)
    check_validation(config.validation, config.dataset, num_images)
    num_images -= config.validation
    steps = count_steps(num_images, config.batch_size, config.epochs, config.max_steps)
    lines = [
        f"world size: {world_size}",
        f"images a rank takes per step: {config.batch_size // world_size}",
        f"parameters: {num_parameters(build_model(config.model, config.seed)):,}",
        f"steps: {steps:,} on {num_images:,} images",
    ]
    return config.to_yaml() + "".join(f"# {line}\n" for line in lines)
