"""The verb `train`: everything around the loop, in the order in which it happens.

Every rank comes through here. Rank 0 alone touches the run directory; what it finds there the others hear from it.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers

from mnist_dist.config.schema import IDENTITY, Config
from mnist_dist.data.dataset import Dataset, check_validation, load_dataset
from mnist_dist.data.download import fetch
from mnist_dist.distributed.device import tune_cpu
from mnist_dist.distributed.world import World, join
from mnist_dist.errors import RequestError, RunError
from mnist_dist.models import build_model, num_parameters
from mnist_dist.run import checkpoint
from mnist_dist.run import run_dir as rundir
from mnist_dist.run.logger import Journal, warn
from mnist_dist.training.trainer import Trainer

STOPPED = 3  # the exit code of a run that stopped on request and can go on


def train(config: Config, recipe: str) -> int:
    """Train, and return the exit code: 0 finished, STOPPED on request. Raises RequestError and RunError."""
    tune_cpu()
    # One rank of each machine fetches, under a lock in case machines share the folder, and before the ranks join:
    # so no time-out of a collective hangs over a slow download. Where it fails that is said after they have joined:
    # if this rank left alone, the others would wait for it.
    fetched: str | RequestError | RunError | None = None
    if int(os.environ.get("LOCAL_RANK") or 0) == 0:
        try:
            fetched = fetch(config.dataset, config.data_dir, mirror=config.mirror, missing=config.missing, say=warn)
        except (RequestError, RunError) as error:
            fetched = error
    world = join(config)  # collective
    try:
        code = _train(config, recipe, world, fetched)
    except (RequestError, RunError, SystemExit):  # all ranks leave by these together
        world.leave()
        raise
    except OSError as error:  # rank 0's, after the last collective
        world.leave()
        raise RunError(f"{error.filename}: {error.strerror or error}") from None
    except Exception as error:
        if world.watch:  # a bug, or a collective that broke because another rank is gone
            world.watch.fail(error)
        raise
    world.leave()
    return code


def _train(config: Config, recipe: str, world: World, fetched: str | RequestError | RunError | None) -> int:
    name = world.together(lambda: _unless_error(fetched))  # collective
    world.together(lambda: _check_trackers(config))  # collective
    dataset = _load_dataset(config, world, name)  # collective
    run = world.together(lambda: _open_run(config, recipe) if world.is_main else None)  # collective
    journal = run.journal if run else None
    saved = run.found.training if run and run.found else None
    run_dir, saved = world.broadcast((run.run_dir, saved) if run else None)  # collective

    trainer = Trainer(config, world, dataset, run_dir, journal)
    if saved:
        world.together(lambda: _resume(config, dataset, trainer, saved))  # collective
    if run and run.found:
        trainer.last_good = str(run.found.path)
    done = rundir.done_step(run_dir) if run else None
    if world.broadcast(done is not None and done >= trainer.total_steps):  # collective
        if journal:
            (run_dir / "STOP").unlink(missing_ok=True)
            journal.say(f"{run_dir} is finished (step {done}); nothing to do")
        return 0
    trainer.learner.prepare()  # collective
    world.together(lambda: _describe(config, world, dataset, trainer, resumed=bool(saved)))  # collective
    if config.log_with:
        _start_trackers(config, world, run_dir, journal)  # collective

    def record_failure(reason: str) -> None:
        with contextlib.suppress(OSError):  # a full disk may be the very reason
            if journal:
                journal.record("failed", step=trainer.state.step, reason=reason)

    if world.watch:
        world.watch.on_verdict = record_failure
    try:
        stopped_by = trainer.train()  # collective
        world.together(trainer.check_failure)  # collective
        world.together(lambda: _stop(trainer, stopped_by) if stopped_by else _finish(config, trainer))  # collective
    except RunError as error:
        record_failure(str(error))
        raise
    finally:
        if journal:
            journal.stop_progress()
    for tracker in world.accelerator.trackers:
        tracker.finish()  # not end_training, which takes the process group down as well
    return STOPPED if stopped_by else 0


def _unless_error(fetched: str | RequestError | RunError | None) -> str | None:
    if isinstance(fetched, Exception):
        raise fetched
    return fetched


def _load_dataset(config: Config, world: World, fetched: str | None) -> Dataset:
    """The dataset, the same one on every rank. Collective."""
    hosts = [member.host for member in world.members]
    names = world.gather(fetched)  # collective
    name = next(n for n, host in zip(names, hosts, strict=True) if n and host == hosts[world.rank])
    dataset = world.together(lambda: load_dataset(name, config.data_dir, config.validation))  # collective
    found = world.gather(f"{dataset.name} {dataset.fingerprint[:12]}")  # collective
    odd = next((rank for rank, other in enumerate(found) if other != found[0]), None)
    if odd is not None:
        if not world.is_main:
            raise SystemExit(2)
        raise RequestError(
            f"rank {odd} on {hosts[odd]} has {found[odd]} in data_dir={config.data_dir} and rank 0 on {hosts[0]} has "
            f"{found[0]}; run `mnist-dist fetch` on both machines, or give a data_dir that they share"
        )
    return dataset


@dataclass
class Run:
    """What rank 0 holds open while it trains."""

    run_dir: Path
    lock: rundir.Lock
    journal: Journal
    found: checkpoint.Checkpoint | None  # to go on from


def _open_run(config: Config, recipe: str) -> Run:
    start = Path(config.resume) if config.resume not in ("auto", "never") else None
    found = None
    if start and not (config.run_dir and (config.run_dir / "checkpoints").exists()):
        found = checkpoint.find(start, warn)  # before a folder is made
    run_dir = config.run_dir or rundir.create(recipe)
    lock = rundir.Lock(run_dir)
    journal = Journal(run_dir)
    checkpoints = run_dir / "checkpoints"
    checkpoint.check_writable(checkpoints)
    checkpoint.sweep(checkpoints)
    own = checkpoint.newest(checkpoints, journal.say)
    if own and config.resume == "never":
        raise RequestError(f"resume=never, but run_dir={run_dir} has checkpoints; give another run_dir")
    if own and start:  # a run that was put back into the queue; what it was started from may be gone
        journal.say(f"note: resume={config.resume} is not used, since run_dir={run_dir} has checkpoints of its own")
    elif start:
        found = found or checkpoint.find(start, journal.say)
    found = own or found
    if found:
        journal.say(f"going on from {found.path}")
    return Run(run_dir, lock, journal, found)


def _resume(config: Config, dataset: Dataset, trainer: Trainer, saved: bytes) -> None:
    """Put a checkpoint's state into the trainer, unless it is another run's."""
    state = checkpoint.parse_training(saved, Path(checkpoint.TRAINING))
    before = dict(state.get("config", {}))
    now = config.model_dump(mode="json")
    before_data, data = state.get("dataset", {}), {"name": dataset.name, "fingerprint": dataset.fingerprint}
    before["dataset"], now["dataset"] = before_data.get("name"), dataset.name
    for key in IDENTITY:
        if before.get(key) != now[key]:
            raise RequestError(
                f"the checkpoint is of a run with {key}={before.get(key)}, not {key}={now[key]}; give that, or another "
                "run_dir"
            )
    if before_data != data:
        raise RequestError(f"the checkpoint was trained on other images that are called {dataset.name} too")
    trainer.load_state_dict(state)
    ignored = ("dataset", "data_dir", "run_dir", "resume", "mirror", "missing")
    changed = [f"{key}={before.get(key)} is now {now[key]}" for key in now if before.get(key) != now[key]]
    if trainer.journal:
        for line in (line for line in changed if not line.startswith(ignored)):
            trainer.journal.say(f"changed since the checkpoint: {line}")


def _describe(config: Config, world: World, dataset: Dataset, trainer: Trainer, *, resumed: bool) -> None:
    """Say and record what is about to run, on what. Only rank 0 does anything, here and in the next two."""
    if not (journal := trainer.journal):
        return
    run_dir = trainer.run_dir
    (run_dir / "DONE").unlink(missing_ok=True)  # more steps are asked for than it had
    rundir.point_latest(run_dir)
    rundir.write_atomically(run_dir / "config.yaml", config.to_yaml())
    facts = {
        **rundir.versions(),
        "world_size": world.size,
        "hosts": sorted({member.host for member in world.members}),
        "device": world.members[0].device,
        "precision": world.precision,
        "threads": torch.get_num_threads(),
        "dataset": dataset.name,
        "images": len(dataset.train.labels),
        "total_steps": trainer.total_steps,
    }
    rundir.write_json(run_dir / "versions.json", facts)
    step = trainer.state.step
    journal.record("resume" if resumed else "start", step=step, **facts)
    for note in world.notes:
        journal.say(f"note: {note}")
    if dataset.name != config.dataset:
        journal.say(f"WARNING: training on DRAWN DIGITS, not on {config.dataset}, which could not be fetched")
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    where = world.members[0].device
    if where == "cpu":
        threads = torch.get_num_threads()
        where += f", {threads} thread{'s' * (threads > 1)}{' each' * (world.size > 1)}"
    journal.say(
        f"{config.model} ({num_parameters(trainer.learner.network):,} parameters) on {dataset.name} "
        f"({len(dataset.train.labels):,} images), {ranks} on {where}, precision {world.precision}"
    )
    journal.say(
        f"{'going on at' if resumed else 'training from'} step {step} to {trainer.total_steps}, global batch "
        f"{config.batch_size}, seed {config.seed}, in {run_dir}"
    )
    journal.start_progress(trainer.total_steps, step)


def _finish(config: Config, trainer: Trainer) -> None:
    """The last figures, and DONE."""
    if not (journal := trainer.journal):
        return
    state, run_dir = trainer.state, trainer.run_dir
    # A run that was killed between its last checkpoint and DONE comes here without having evaluated.
    evaluation = trainer.evaluation or trainer.evaluate_on(trainer.held_out)
    journal.stop_progress()
    if config.evaluate_train:
        on_train = trainer.evaluate_on(trainer.train_split)
        journal.record("eval", step=state.step, epoch=config.epochs - 1, split="train", **on_train.record())
        journal.say(f"train accuracy {100 * on_train.accuracy:.2f} % ({on_train.correct:,} of {on_train.count:,})")
    done = {"step": state.step, "seconds": state.seconds, "accuracy": evaluation.accuracy}
    journal.record("done", **done)
    rundir.write_json(run_dir / "DONE", done)
    (run_dir / "STOP").unlink(missing_ok=True)
    journal.say(
        f"{trainer.dataset.held_out_name} accuracy {100 * evaluation.accuracy:.2f} % ({evaluation.correct:,} of "
        f"{evaluation.count:,}) after {state.step} steps, {state.seconds:.1f} s of training; "
        f"weights in {trainer.last_good}/{checkpoint.MODEL}"
    )


def _stop(trainer: Trainer, reason: str) -> None:
    """The last words of a run that can go on."""
    if not (journal := trainer.journal):
        return
    state, run_dir = trainer.state, trainer.run_dir
    journal.stop_progress()
    journal.record("stop", step=state.step, reason=reason)
    (run_dir / "STOP").unlink(missing_ok=True)
    journal.say(
        f"stopped at step {state.step} of {trainer.total_steps} by {reason}; "
        f"to go on, start it again with run_dir={run_dir}"
    )


def _check_trackers(config: Config) -> None:
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in config.log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RequestError(f"log_with={name} is no tracker; Accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise RequestError(
                f"log_with={name} is not installed here; `pip install {name}`, or mnist-dist[tracking] for tensorboard"
            )


def _start_trackers(config: Config, world: World, run_dir: Path, journal: Journal | None) -> None:
    """Start Accelerate's trackers, which write on rank 0 only. Collective."""
    accelerator = world.accelerator
    accelerator.project_configuration.set_directories(str(run_dir))
    accelerator.log_with = filter_trackers(list(config.log_with), str(run_dir))
    settings = {k: v if isinstance(v, int | float) else str(v) for k, v in config.model_dump(mode="json").items()}
    accelerator.init_trackers("tracking", config=settings)  # collective
    if journal:
        journal.track = lambda numbers, step: accelerator.log(numbers, step=step)


def plan(config: Config, world_size: int) -> str:
    """What a start with this configuration would do, for `--dry-run`. Joins nobody, fetches and writes nothing."""
    lines = [
        f"world size: {world_size}",
        f"images a rank takes per step: {config.batch_size // world_size}",
        f"parameters: {num_parameters(build_model(config.model, config.seed)):,}",
    ]
    num_images = {"emnist-digits": 240_000}.get(config.dataset, 60_000)
    check_validation(config.validation, config.dataset, num_images)
    num_images -= config.validation
    steps = config.epochs * -(-num_images // config.batch_size)
    lines.append(f"steps: {min(steps, config.max_steps or steps):,} on {num_images:,} images")
    return config.to_yaml() + "".join(f"# {line}\n" for line in lines)
