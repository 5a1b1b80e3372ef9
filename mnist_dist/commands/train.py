"""The verb `train`: everything around the loop, in the order in which it happens.

Every rank comes through here. Rank 0 alone touches the run directory; what it finds there the others hear from it.
"""

import contextlib
from dataclasses import dataclass
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
    RequestError,
    RunError,
    StoppedEarlyError,
    StorageError,
    one_line,
)
from mnist_dist.files import write_atomically, write_json
from mnist_dist.models import build_model, num_parameters
from mnist_dist.run import checkpoint, resume, run_dir, stop
from mnist_dist.run.checkpoint import Checkpoint
from mnist_dist.run.logger import Logger, NullLogger, warn
from mnist_dist.run.run_dir import Lock, RunDir
from mnist_dist.run.trackers import check_trackers, finish_trackers, start_trackers
from mnist_dist.training.schedule import learning_rate
from mnist_dist.training.trainer import Trainer
from mnist_dist.versions import commit, library_versions


def train(config: Config, recipe: str, env: LaunchEnv) -> int:
    """Train, and return the exit code: FINISHED, or STOPPED on request. Raises JobError."""
    tune_cpu()
    with stop.interruptible("fetching the dataset"):
        downloaded = download_once(config, env)
    with stop.interruptible("waiting for the other ranks"):
        meeting = meet_ranks(config, env)  # collective
    with init_distributed(config, env, meeting) as world:  # collective
        with world.shared_errors():  # collective
            if isinstance(downloaded, JobError):
                raise downloaded
            check_trackers(config.log_with)
        dataset = load_same_dataset(config, world, downloaded)  # collective
        with world.shared_errors():  # collective
            start = open_run(config, recipe, env) if world.is_main else None
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
            return FINISHED
        with world.shared_errors():  # collective
            if world.is_main:
                describe(trainer, is_resumed=bool(saved))
        if config.log_with:
            start_trackers(config, world, trainer.run_dir, logger)  # collective
        code = run_loop(trainer)  # collective
    if start and code == FINISHED:  # no rank waits for it any more
        write_report(trainer)
    return code


def run_loop(trainer: Trainer) -> int:
    """Train, and record how it ended; the same exit codes. Collective. Raises RunError."""
    world, logger = trainer.world, trainer.logger

    def record_failure(failure: Verdict | RunError) -> None:
        reason = failure.sentence if isinstance(failure, Verdict) else str(failure)
        logger.log_metrics("failed", step=trainer.state.step, cause=failure.cause, reason=reason)

    if world.watchdog:
        world.watchdog.on_verdict = record_failure
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
        record_failure(error)
        logger.log_line(str(error))  # the console hears it from cli.main
        raise
    finally:
        logger.stop_progress()
    finish_trackers(world)
    return STOPPED if stopped_by else FINISHED


def download_once(config: Config, env: LaunchEnv) -> str | JobError | None:
    """The dataset's name on one rank of each machine, None on the others; or the error, which is said once all joined.

    It comes before the ranks join, so that no time-out of a collective hangs over a slow download. If this rank left
    alone, the others would wait for it. Machines that share the folder take turns by a lock.
    """
    if env.local_rank:
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
    name = (here or [n for n in names if n])[0]  # a launcher need not start a rank 0 on each machine
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
    lock: Lock
    logger: Logger
    found: Checkpoint | None  # to go on from

    @property
    def saved(self) -> bytes | None:
        """The training state to go on from."""
        return self.found.training if self.found else None


def open_run(config: Config, recipe: str, env: LaunchEnv) -> Start:
    """Make or find the run directory, lock it, and see what is in it. Raises RequestError, StorageError, OSError."""
    source = resume.find_source(config, warn)
    folder = RunDir(config.run_dir) if config.run_dir else run_dir.create(recipe)
    lock = Lock(folder)
    if env.exit_code_file is None:  # our scripts, which leave such a file, do it before the ranks start
        stop.remove_stale(folder.stop)
    logger = Logger(folder)
    checkpoint.check_writable(folder.checkpoints)
    checkpoint.sweep(folder.checkpoints)
    return Start(folder, lock, logger, resume.find_start(config, folder, source, logger.info))


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


def say_jump(trainer: Trainer, before: dict[str, Any]) -> None:
    """Say where the learning rate goes on from another value, since the run has become longer, for one."""
    config, num_images, step = trainer.config, len(trainer.dataset.train.labels), trainer.state.step
    names = ("lr", "schedule", "warmup", "epochs", "max_steps")
    past = config.model_copy(update={name: before[name] for name in names if name in before})
    past_steps = count_steps(num_images, config.batch_size, past.epochs, past.max_steps)
    update = step - trainer.state.skipped
    was = learning_rate(update, past_steps, past.lr, past.schedule, past.warmup)
    now = trainer.learning_rate(step)
    if 0 < step < trainer.total_steps and abs(now - was) > 1e-3 * max(now, abs(was)):
        trainer.logger.info(f"note: the learning rate at step {step} was to be {max(was, 0):.3g} and is now {now:.3g}")


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


def describe(trainer: Trainer, *, is_resumed: bool) -> None:
    """Say and record what is about to run, on what. On rank 0. Raises OSError, StorageError."""
    config, world, logger, dataset = trainer.config, trainer.world, trainer.logger, trainer.dataset
    folder, step = trainer.run_dir, trainer.state.step
    folder.done.unlink(missing_ok=True)  # more steps are asked for than it had
    with contextlib.suppress(OSError):  # nothing about a report ends a run
        folder.report.unlink(missing_ok=True)
    if problem := folder.make_latest():
        logger.info(f"note: {problem}")
    recorded = config.model_copy(update={"data_dir": config.data_dir.absolute()})  # to be found from another folder
    write_atomically(folder.config, recorded.to_yaml().encode())
    facts = {
        **library_versions(),
        "commit": commit(),
        "world_size": world.size,
        "hosts": sorted({member.host for member in world.members}),
        "device": world.members[0].device,
        "precision": world.precision,
        "threads": torch.get_num_threads(),
        "processor": world.members[0].processor,
        "bit_exact": config.bit_exact,
        "label_smoothing": config.label_smoothing,  # of the loss in the step records
        "dataset": dataset.name,
        "images": len(dataset.train.labels),
        "total_steps": trainer.total_steps,
    }
    write_json(folder.versions, facts)
    logger.log_metrics("resume" if is_resumed else "start", step=step, **facts)
    for note in world.notes:
        logger.info(f"note: {note}")
    if dataset.name != config.dataset:
        logger.info(f"WARNING: training on DRAWN DIGITS, not on {config.dataset}, which could not be fetched")
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    where = world.members[0].device
    if where == "cpu":
        threads = torch.get_num_threads()
        where += f", {threads} thread{'s' * (threads > 1)}{' each' * (world.size > 1)}"
    exact = f", the bits of {config.bit_exact} ranks" if config.bit_exact else ""
    logger.info(
        f"{config.model} ({num_parameters(trainer.train_step.network):,} parameters) on {dataset.name} "
        f"({len(dataset.train.labels):,} images), {ranks} on {where}, precision {world.precision}{exact}"
    )
    logger.info(
        f"{'going on at' if is_resumed else 'training from'} step {step} to {trainer.total_steps}, global batch "
        f"{config.batch_size}, seed {config.seed}, in {folder}"
    )
    if config.label_smoothing:
        logger.info(
            f"note: the train loss is with label_smoothing={config.label_smoothing:g}, the {dataset.eval_name} loss "
            "without, so that the two do not compare"
        )
    check_record(trainer)
    logger.start_progress(trainer.total_steps, step)


def check_record(trainer: Trainer) -> None:
    """Raises StorageError where a file of the record could not be written."""
    if trainer.logger.failure:
        raise StorageError(f"{trainer.logger.failure}; the last good checkpoint is {trainer.last_good}")


def finish(trainer: Trainer) -> None:
    """The last figures, and DONE. On rank 0. Raises OSError, StorageError."""
    state, folder, logger = trainer.state, trainer.run_dir, trainer.logger
    # A run that was killed between its last checkpoint and DONE comes here without having evaluated.
    evaluation = trainer.evaluation = trainer.evaluation or trainer.evaluate_on(trainer.eval_split)
    logger.stop_progress()
    if trainer.config.evaluate_train:
        on_train = trainer.evaluate_on(trainer.train_split)
        epoch = trainer.config.epochs - 1
        logger.log_metrics("eval", step=state.step, epoch=epoch, split="train", **on_train.record())
        logger.info(f"train accuracy {100 * on_train.accuracy:.2f} % ({on_train.correct:,} of {on_train.count:,})")
    done = {"step": state.step, "seconds": state.seconds, "accuracy": evaluation.accuracy}
    logger.log_metrics("done", **done)
    check_record(trainer)
    write_json(folder.done, done)
    folder.stop.unlink(missing_ok=True)
    logger.info(
        f"{trainer.dataset.eval_name} accuracy {100 * evaluation.accuracy:.2f} % ({evaluation.correct:,} of "
        f"{evaluation.count:,}) after {state.step} steps, {state.seconds:.1f} s of training; "
        f"weights in {trainer.last_good}/{checkpoint.MODEL}"
    )


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


def say_stopped(trainer: Trainer, reason: str) -> None:
    """The last words of a run that can go on. On rank 0. Raises OSError, StorageError."""
    logger, step = trainer.logger, trainer.state.step
    logger.stop_progress()
    logger.log_metrics("stop", step=step, reason=reason)
    check_record(trainer)
    trainer.run_dir.stop.unlink(missing_ok=True)
    logger.info(
        f"stopped at step {step} of {trainer.total_steps} by {reason}; "
        f"to go on, start it again with run_dir={trainer.run_dir}"
    )


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
