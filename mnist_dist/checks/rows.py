"""How findings and verdicts are printed: the guilty first, the verdict last."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from mnist_dist.checks.findings import CHECKS, COMPARISONS, Finding, Status, worst

COLOURS = {Status.FAIL: "bold red", Status.WARN: "yellow", Status.SKIP: "cyan", Status.PASS: "green"}
ORDER = [*CHECKS, *COMPARISONS]


def count_ranks(num_ranks: int, num_hosts: int) -> str:
    """How many ranks on how many hosts, in words."""
    return f"{num_ranks} rank{'s' * (num_ranks > 1)} on {num_hosts} host{'s' * (num_hosts > 1)}"


def sort_findings(findings: Sequence[Finding]) -> list[Finding]:
    """The worst first, and those that are as bad in the order of their checks."""
    return sorted(findings, key=lambda f: (list(Status).index(f.status), ORDER.index(f.check.split(", ")[0])))


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """A row each, with cause and cure under it."""
    for finding in sort_findings(findings):
        print_row(console, finding.status, f"{finding.check}: {finding.text}")
        console.print(f"      cause: {finding.cause}", style="dim" if sys.stdout.isatty() else None, markup=False)
        console.print(f"      cure:  {finding.cure}", markup=False)


def print_row(console: Console, status: Status, text: str) -> None:
    """One row, its status in colour."""
    console.print(Text.assemble((f"{status:<6}", COLOURS[status]), text))


def print_verdict(console: Console, statuses: Mapping[str, Status], seconds: float) -> None:
    """PASS, or FAIL with the checks that failed."""
    failed = [check for check, status in statuses.items() if status == Status.FAIL]
    words = f"FAIL: {', '.join(failed)}" if failed else "PASS"
    if warnings := [check for check, status in statuses.items() if status == Status.WARN]:
        words += f", with warnings: {', '.join(warnings)}"
    style = COLOURS[Status.FAIL if failed else Status.PASS]
    console.print(Text(f"verdict: {words} (after {seconds:.0f} s)", style=style))


def write_json_verdict(
    statuses: Mapping[str, Status], findings: Sequence[Finding], seconds: float, details: Mapping[str, Any]
) -> None:
    """Print everything as one JSON object."""
    verdict = "FAIL" if worst(findings) == Status.FAIL else "PASS"
    rows = [asdict(finding) for finding in sort_findings(findings)]
    print(json.dumps({"verdict": verdict, "seconds": seconds, "checks": statuses, "findings": rows, **details}))
