"""The page of a run, or of several compared: one HTML file that needs nothing else, neither script nor network."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from mnist_dist.config.paths import redact_address
from mnist_dist.config.schema import Config
from mnist_dist.config.yaml_file import read_file
from mnist_dist.errors import RequestError
from mnist_dist.report.charts import DASHES, NUM_COLOURS, Mark, Series, draw, group_size, png
from mnist_dist.run.metrics import End, Eval, Record, Start, read_record
from mnist_dist.run.run_dir import RunDir
from mnist_dist.training.evaluation import Evaluation, accuracy_interval

PLACES = ("run_dir", "data_dir")  # where files lie is no difference between two runs
CELL = 33  # side of a cell of the confusion matrix, in the picture's own units
_DASH_ARRAYS = dict(zip(DASHES, ("none", "7 3", "2 3"), strict=True))


@dataclass(frozen=True)
class Examined:
    """What the network of a run's last checkpoint makes of the images that it is evaluated on."""

    evaluation: Evaluation
    images: Tensor  # uint8 [n, 28, 28], those of the mistakes, on the CPU
    split: str  # "test" or "validation"
    step: int


@dataclass
class Run:
    """What is known of a run."""

    folder: RunDir
    record: Record = field(default_factory=Record)
    config: dict[str, Any] = field(default_factory=dict)  # texts, or lists of them
    seconds: float | None = None  # of training
    examined: Examined | None = None
    not_examined: str = ""  # why
    notes: list[str] = field(default_factory=list)  # sentences on what is missing or damaged

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.path.absolute().name

    @property
    def facts(self) -> dict[str, Any]:
        """What ran the last time, on what."""
        line = self.record.starts[-1].facts if self.record.starts else {}
        return {key: value for key, value in line.items() if key not in ("event", "step")}


@dataclass(frozen=True)
class Result:
    """How good a run's network is."""

    accuracy: float
    low: float  # of the 95 % interval
    high: float
    loss: float  # nats
    count: int  # images
    split: str
    step: int
    source: str


@dataclass(frozen=True)
class Panel:
    """A chart with its title, and what its colours mean."""

    title: str
    chart: Any  # Markup, or None where there is nothing to draw
    legend: Sequence[tuple[int, str]] = ()  # number of a series, and what it is
    note: str = ""


def examine(evaluation: Evaluation, images: Tensor, split: str, step: int) -> Examined:
    """An evaluation of `images` (uint8 [n, 28, 28], on any device) with those that it took for another class."""
    mistakes = torch.tensor([mistake.image for mistake in evaluation.mistakes], dtype=torch.int64)
    return Examined(evaluation, images[mistakes.to(images.device)].cpu(), split, step)


def read_run(folder: RunDir) -> Run:
    """What a run's files say, whatever is missing of them."""
    run = Run(folder)
    try:
        run.record = read_record(folder.metrics)
    except OSError as error:
        run.notes.append(f"metrics.jsonl, which has every figure, cannot be read: {error.strerror}.")
    if count := run.record.num_unreadable:
        lines = "1 line" if count == 1 else f"{count:,} lines"
        run.notes.append(f"{lines} of metrics.jsonl cannot be read: cut short by a crash, or damaged.")
    try:
        run.config = read_file(folder.config)
    except RequestError as error:
        run.notes.append(f"The configuration cannot be read: {error}.")
    if run.record.end:
        run.seconds = run.record.end.seconds
    return run


def make_page(runs: Sequence[Run]) -> str:
    """The page of one run, or of several compared, as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "figure": figure, "text": text, "png": png}
    if len(runs) == 1:
        page = environment.get_template("run.html").render(describe(runs[0]))
    else:
        page = environment.get_template("comparison.html").render(compare(runs))
    # A name that is no text, as Linux allows it, must not keep the page from being written.
    return page.encode(errors="backslashreplace").decode()


# --- one run ---


def describe(run: Run) -> dict[str, Any]:
    """What run.html shows."""
    examined = run.examined
    return {
        "run": run,
        "status": status(run),
        "tiles": tiles(run),
        "panels": run_panels(run),
        "cell": CELL,
        "confusion": confusion_cells(examined.evaluation.confusion) if examined else [],
        "classes": class_rows(examined.evaluation.confusion) if examined else [],
        "mistakes": list(zip(examined.evaluation.mistakes, examined.images, strict=True)) if examined else [],
        "history": [(event, event_line(event)) for event in run.record.history],
    }


def status(run: Run) -> str:
    """How the run ended, in a sentence."""
    end = run.record.end
    if end:
        return event_line(end)
    if run.record.steps:
        step = run.record.steps[-1].step
        return f"The record breaks off after step {step:,} without a last word: the run was killed, or it still runs."
    return "No step is recorded: the run was killed before that, or has just begun."


def event_line(event: Start | End) -> str:
    """A line of a run's history."""
    step = f"step {event.step:,}"
    if isinstance(event, Start):
        begun = "Started at" if event.event == "start" else "Resumed at"
        device = f" on {event.facts['device']}" if event.facts.get("device") else ""
        return f"{begun} {step}, {ranks(event.world_size)}{device}."
    if event.event == "done":
        return f"Finished after {step}."
    what = "Stopped on request" if event.event == "stop" else "Failed"
    return f"{what} after {step}: {event.reason}."


def result(run: Run) -> Result | None:
    """The accuracy of the last checkpoint; or, where that could not be evaluated, the last one that is recorded."""
    if run.examined:
        evaluation, split, step = run.examined.evaluation, run.examined.split, run.examined.step
        figures = (evaluation.accuracy, *evaluation.interval(), evaluation.loss, evaluation.count)
        return Result(*figures, split, step, f"checkpoint of step {step:,}")
    if recorded := recorded_evals(run):
        last = recorded[-1]
        figures = (last.accuracy, *accuracy_interval(last.accuracy, last.count), last.loss, last.count)
        return Result(*figures, last.split, last.step, f"recorded at step {last.step:,}")
    return None


def recorded_evals(run: Run) -> list[Eval]:
    """The recorded evaluations on images that the run was not trained on."""
    return [each for each in run.record.evals if each.split in ("test", "validation")]


def images_per_s(run: Run) -> float | None:
    """The middle one of the records: the first steps and the short last batch of an epoch are not typical."""
    rates = [step.images_per_s for step in run.record.steps if math.isfinite(step.images_per_s)]
    return statistics.median(rates) if rates else None


def world_sizes(run: Run) -> str:
    """The world size of each start, one after another; what repeats stands once."""
    sizes = [start.world_size for start in run.record.starts]
    changed = [size for i, size in enumerate(sizes) if i == 0 or size != sizes[i - 1]]
    return ", then ".join(map(str, changed))


def num_steps(run: Run) -> int | None:
    """Steps that are recorded."""
    end = run.record.end
    return end.step if end else run.record.steps[-1].step + 1 if run.record.steps else None


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The headline: name, figure and explanation."""
    measured, rate, steps = result(run), images_per_s(run), num_steps(run)
    total, exact = run.facts.get("total_steps"), whole_number(run.config.get("bit_exact", run.facts.get("bit_exact")))
    tile = ("accuracy", "not known", "no evaluation is recorded")
    if measured:
        correct = round(measured.accuracy * measured.count)
        tile = (
            f"{measured.split} accuracy",
            percent(measured.accuracy),
            f"95 % interval {100 * measured.low:.2f} to {percent(measured.high)}; {correct:,} of {measured.count:,} "
            f"images, {measured.source}",
        )
    of_total = f" of {total:,}" if isinstance(total, int) else ""
    return [
        tile,
        (
            "training",
            f"{run.seconds:,.1f} s" if run.seconds is not None else "not known",
            f"{steps:,}{of_total} steps; evaluation and saving are not counted" if steps else "no step is recorded",
        ),
        ("images/s", f"{rate:,.0f}" if rate else "not known", "median of the records"),
        ("world size", world_sizes(run) or "not known", text(run.facts.get("device", ""))),
        (
            "bit_exact",
            {0: "off", None: "not known"}.get(exact, str(exact)),
            f"the weights have the bits of {ranks(exact)}" if exact else "",
        ),
    ]


def run_panels(run: Run) -> list[Panel]:
    """The charts of a run over its steps."""
    record, evals = run.record, recorded_evals(run)
    steps = [step.step for step in record.steps]
    split = evals[-1].split if evals else ""
    on_train = [each for each in record.evals if each.split == "train"]
    marks = start_marks(record.starts)
    size = group_size(len(steps))
    mean = f"Each point is the mean of {size} records." if size > 1 else ""

    def line(values: Sequence[float]) -> Series:
        return Series(steps, values, 0)

    loss = [line([step.loss for step in record.steps]), eval_series(evals, 1, [each.loss for each in evals])]
    legend = [(0, "training")] * bool(steps) + [(1, split)] * bool(evals)
    accuracy = [
        eval_series(evals, 1, [100 * each.accuracy for each in evals], has_interval=True),
        eval_series(on_train, 0, [100 * each.accuracy for each in on_train], has_interval=True),
    ]
    accuracy_legend = [(1, split)] * bool(evals) + [(0, "training images")] * bool(on_train)
    rates = [line([step.lr for step in record.steps])]
    bars = "The bars are 95 % intervals." if evals else ""
    panels = [
        Panel("Loss, nats", draw("Loss by step", loss, marks, is_loss=True), legend, mean),
        Panel("Accuracy, %", draw("Accuracy by step, in percent", accuracy, marks), accuracy_legend, bars),
        Panel("Learning rate", draw("Learning rate by step", rates, marks, is_from_zero=True), (), mean),
    ]
    if batch_size := whole_number(run.config.get("batch_size")):
        times = [step_time_ms(batch_size, step.images_per_s) for step in record.steps]
        chart = draw("Time of a step, in milliseconds", [line(times)], marks, is_from_zero=True)
        return [*panels, Panel("Time of a step, ms", chart, (), f"{mean} Measured from sync to sync.".strip())]
    return [*panels, Panel("Time of a step", None, (), "It follows from batch_size, which is not known.")]


def eval_series(evals: Sequence[Eval], number: int, values: list[float], *, has_interval: bool = False) -> Series:
    """A curve with a dot for each evaluation, with the interval of an accuracy in percent."""
    spread = [accuracy_interval(each.accuracy, each.count) for each in evals] if has_interval else []
    in_percent = [(100 * low, 100 * high) for low, high in spread]
    return Series([each.step for each in evals], values, number, in_percent, is_marked=True)


def step_time_ms(batch_size: int, images_per_s: float) -> float:
    """Milliseconds of a step, or NaN."""
    return 1000 * batch_size / images_per_s if images_per_s > 0 else math.nan


def start_marks(starts: Sequence[Start]) -> list[Mark]:
    """A mark for each start, if there are several; the world size stands where it is another than before."""
    if len(starts) < 2:
        return []
    sizes = [0, *(start.world_size for start in starts)]
    return [
        Mark(start.step, "" if start.world_size == before else ranks(start.world_size))
        for start, before in zip(starts, sizes[:-1], strict=True)
    ]


def confusion_cells(confusion: Tensor) -> list[list[tuple[int, float]]]:
    """Rows of (count, shade): a mistake's share of the most frequent one, as a shade between 0 and 1."""
    rows = confusion.tolist()
    most = max((n for i, row in enumerate(rows) for j, n in enumerate(row) if i != j), default=0)
    return [
        [(n, math.sqrt(n / most) if n and i != j else 0.0) for j, n in enumerate(row)] for i, row in enumerate(rows)
    ]


def class_rows(confusion: Tensor) -> list[dict[str, Any]]:
    """Accuracy of each class that has images."""
    rows = []
    for number, (correct, count) in enumerate(
        zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)
    ):
        if count:
            low, high = accuracy_interval(correct / count, count)
            rows.append({"class": number, "accuracy": correct / count, "low": low, "high": high, "count": count})
            rows[-1]["wrong"] = count - correct
    most = max((row["wrong"] / row["count"] for row in rows), default=0) or 1
    return [row | {"share": row["wrong"] / row["count"] / most} for row in rows]


# --- several runs ---


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """What comparison.html shows."""
    configs = [run.config for run in runs]
    facts = [run.facts for run in runs]
    are_names_unique = len({run.name for run in runs}) == len(runs)
    return {
        "runs": runs,
        "labels": [run.name if are_names_unique else str(run.folder) for run in runs],
        "dashes": [dash_array(number) for number in range(len(runs))],
        "results": [(run, result(run), num_steps(run), images_per_s(run), world_sizes(run)) for run in runs],
        "statuses": [status(run) for run in runs],
        "config_rows": differences(configs, [key for key in Config.model_fields if key not in PLACES]),
        "fact_rows": differences(facts, list(dict.fromkeys(key for each in facts for key in each))),
        "panels": comparison_panels(runs),
    }


def differences(descriptions: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The keys in which the runs differ, each with the runs' values; `not known` where a run does not say."""
    rows = [(key, [text(each[key]) if key in each else "not known" for each in descriptions]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def comparison_panels(runs: Sequence[Run]) -> list[Panel]:
    """The charts of several runs, laid over each other."""
    training, learning_rates, times, losses, accuracies = [], [], [], [], []
    sizes = set()
    for number, run in enumerate(runs):
        steps, evals = [step.step for step in run.record.steps], recorded_evals(run)
        sizes.add(group_size(len(steps)))
        training.append(Series(steps, [step.loss for step in run.record.steps], number))
        learning_rates.append(Series(steps, [step.lr for step in run.record.steps], number))
        if batch_size := whole_number(run.config.get("batch_size")):
            values = [step_time_ms(batch_size, step.images_per_s) for step in run.record.steps]
            times.append(Series(steps, values, number))
        losses.append(eval_series(evals, number, [each.loss for each in evals]))
        accuracies.append(eval_series(evals, number, [100 * each.accuracy for each in evals], has_interval=True))
    mean = f"Of a long run each point is the mean of up to {max(sizes)} records." if max(sizes) > 1 else ""
    splits = {each.split for run in runs for each in recorded_evals(run)}
    mixed = "Some are of the test images and some of validation images." if len(splits) > 1 else ""
    bars = f"The bars are 95 % intervals. {mixed}".strip() if splits else ""
    return [
        Panel("Training loss, nats", draw("Training loss by step", training, is_loss=True), (), mean),
        Panel("Loss where it is evaluated, nats", draw("Evaluated loss by step", losses, is_loss=True), (), mixed),
        Panel("Accuracy, %", draw("Accuracy by step, in percent", accuracies), (), bars),
        Panel("Learning rate", draw("Learning rate by step", learning_rates, is_from_zero=True), (), mean),
        Panel("Time of a step, ms", draw("Time of a step, in milliseconds", times, is_from_zero=True), (), mean),
    ]


# --- how values are written ---


def ranks(count: int) -> str:
    """A number of ranks in words."""
    return "1 rank" if count == 1 else f"{count:,} ranks"


def dash_array(number: int) -> str:
    """The dashes of a series, as SVG has them."""
    return _DASH_ARRAYS[DASHES[number // NUM_COLOURS % len(DASHES)]]


def whole_number(value: Any) -> int | None:
    """A number of a configuration, which is text, or None where it is none."""
    digits = text(value)
    return int(digits) if digits.isdecimal() and len(digits) < 10 else None


def percent(share: float) -> str:
    """A share between 0 and 1 in percent."""
    return f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def figure(value: float | None, digits: int = 0) -> str:
    """A figure, or that it is not known."""
    return "not known" if value is None else f"{value:,.{digits}f}"


def text(value: Any) -> str:
    """A value of a configuration or of a record as text, without a password in an address."""
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    if isinstance(value, bool):
        return str(value).lower()
    return redact_address("" if value is None else str(value), by="")
