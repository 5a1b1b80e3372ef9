"""A measurement as tables for a person; 80 columns suffice."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mnist_dist.speed.changes import Change
from mnist_dist.speed.figures import Spread
from mnist_dist.speed.measure import PARTS

HEADS = {"data": "data", "forward": "fwd", "backward": "bwd", "exchange": "exch", "optimizer": "opt"}


def make_table(title: str, heads: Sequence[str]) -> Table:
    """A table without lines, its first column on the left."""
    table = Table(title=title, box=None, pad_edge=False, title_justify="left", title_style="bold", padding=(0, 2, 0, 0))
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def percent(row: dict[str, Any]) -> str:
    """Half the distance of the quartiles, in per cent of the median."""
    return f"{100 * Spread(**row).half_width:.0f}"


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Steps, scaling and exchange."""
    hardware, plan = summary["hardware"], summary["plan"]
    sizes = ", ".join(map(str, plan["world_sizes"]))
    console.print(
        f"bench: {', '.join(hardware['devices'])} ({'; '.join(hardware['processor_names'])}), precision "
        f"{summary['request']['precision']}, world sizes measured: {sizes}",
        markup=False,
    )
    print_steps(console, summary)
    if summary["strong"] or summary["weak"]:
        print_scaling(console, summary)
    if summary["exchanges"]:
        print_exchanges(console, summary)
    console.print(
        f"\n+- %: half the distance of the quartiles of {plan['rounds']} repetitions. {', '.join(HEADS.values())}: "
        "shares of a step that waits for the device after each part, in % of their sum; sum: the parts together, in % "
        "of the step without these waits.",
        markup=False,
    )
    if any(row["is_cuda_graph"] for row in summary["steps"]):
        console.print("*: the step is one CUDA graph; its parts are those of the step that launches each kernel.")
    for left_out in plan["left_out"]:
        console.print(f"left out: {left_out}", markup=False)
    for note in summary["notes"]:
        console.print(f"note: {note}", markup=False)


def print_steps(console: Console, summary: dict[str, Any]) -> None:
    """A row for each case."""
    heads = ["", "batch", "ranks", "images/s", "step, ms", "+- %", *HEADS.values(), "sum"]
    table = make_table("\nsteps: global batch, ranks x threads of each", heads)
    for row in summary["steps"]:
        parts = {part: row["parts_s"][part]["median"] for part in PARTS}
        shares = [f"{100 * parts[part] / sum(parts.values()):.0f}" for part in PARTS]
        table.add_row(
            row["model"],
            str(row["batch_size"]),
            f"{row['ranks']} x {row['threads']}",
            f"{row['images_per_s']['median']:,.0f}",
            f"{1e3 * row['step_s']['median']:.2f}{'*' if row['is_cuda_graph'] else ''}",
            percent(row["step_s"]),
            *shares,
            f"{100 * row['parts_by_step']['median']:.0f}",
        )
    console.print(table)


def print_scaling(console: Console, summary: dict[str, Any]) -> None:
    """A row for each network, batch and number of ranks; the same batch in all, and the same a rank."""
    heads = ["", "batch", "ranks", "speed-up", "strong, %", "+- %", "serial", "weak, %", "+- %"]
    threads = summary["plan"]["threads"]
    title = f"\nscaling against one rank with {threads} thread{'s' * (threads > 1)}: efficiency with this batch in all "
    table = make_table(f"{title}(strong) and a rank (weak)", heads)
    strong = {(r["model"], r["batch_size"], r["ranks"]): r for r in summary["strong"]}
    weak = {(r["model"], r["batch_size_a_rank"], r["ranks"]): r for r in summary["weak"]}
    for place in dict.fromkeys([*strong, *weak]):
        model, batch, ranks = place
        cells = [model, str(batch), str(ranks)]
        if row := strong.get(place):
            cells += [f"{row['speed_up']['median']:.2f}", f"{100 * row['efficiency']['median']:.0f}"]
            cells += [percent(row["efficiency"]), f"{row['serial_fraction']['median']:.2f}"]
        else:
            cells += [""] * 4
        if row := weak.get(place):
            cells += [f"{100 * row['efficiency']['median']:.0f}", percent(row["efficiency"])]
        table.add_row(*cells)
    console.print(table)


def print_exchanges(console: Console, summary: dict[str, Any]) -> None:
    """A row for each vector and number of ranks."""
    table = make_table("\nexchange by itself: 2(n-1)/n x bytes / s", ["ranks", "vector, MB", "ms", "+- %", "bus, GB/s"])
    for row in summary["exchanges"]:
        table.add_row(
            str(row["ranks"]),
            f"{row['bytes'] / 1e6:.2f}",
            f"{1e3 * row['exchange_s']['median']:.2f}",
            percent(row["exchange_s"]),
            f"{row['bus_bytes_per_s']['median'] / 1e9:.2f}",
        )
    console.print(table)


def print_comparison(console: Console, against: dict[str, Any]) -> None:
    """What has changed since an earlier measurement, what has not, and what could not be compared."""
    lines = [f"\nagainst {against['file']}:"]
    lines += [f"  not the same {difference}" for difference in [*against["obstacles"], *against["versions"]]]
    if against["obstacles"]:
        lines.append("  so nothing was compared: figures of speed compare on one machine, for one request")
    else:
        num_changed, num_unchanged = len(against["changed"]), len(against["unchanged"])
        compared = f"{num_changed + num_unchanged} medians of steps and exchanges compared"
        lines.append(f"  {compared}, {num_changed} changed beyond the quartiles")
        lines += [f"  {Change(**change)}" for change in against["changed"]]
        lines += [f"  only before, not compared: {figure}" for figure in against["only_before"]]
        lines += [f"  only now, not compared: {figure}" for figure in against["only_now"]]
    console.print("\n".join(lines), markup=False)
