"""What a run says and records before its first step and after its last. On rank 0."""

import contextlib
from typing import Any

import torch

from mnist_dist.data.sampler import count_steps
from mnist_dist.distributed.device import nccl_version
from mnist_dist.distributed.world import World
from mnist_dist.errors import StorageError
from mnist_dist.files import write_atomically, write_json
from mnist_dist.models import num_parameters
from mnist_dist.run import checkpoint
from mnist_dist.training.schedule import learning_rate
from mnist_dist.training.trainer import Trainer
from mnist_dist.versions import commit, library_versions


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
        **describe_gpus(world),
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
    if gpus := describe_gpus(world):
        kinds = "; ".join(f"{host}: {gpu}" for host, gpu in gpus["gpus"].items())
        logger.info(f"{kinds}; CUDA {gpus['cuda']}, NCCL {gpus['nccl']}")
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


def describe_gpus(world: World) -> dict[str, Any]:
    """The GPU and driver of each host, CUDA's and NCCL's versions; nothing on CPUs."""
    gpus = {m.host: f"{m.device.partition(': ')[2]}, driver {m.driver}" for m in world.members if m.driver}
    return {"gpus": gpus, "cuda": torch.version.cuda, "nccl": nccl_version()} if gpus else {}


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
