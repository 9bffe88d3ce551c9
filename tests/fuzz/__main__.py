"""`python -m tests.fuzz`: the command line."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter

import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .campaign import FAULTS, Outcome, Verdict, campaign


def main(
    *,
    seed: int = 0,
    count: int = 1000,
    first: int = 0,
    processes: int = os.cpu_count() or 1,
    show: tuple[Verdict, ...] = FAULTS,
) -> None:
    """Damage files of every kind and count what the library makes of them. Exits with 1 if there is a fault.

    Args:
        seed: the same seed gives the same damages.
        count: number of damaged folders.
        first: number of the first one; with --count 1, one input again.
        processes: worker processes.
        show: verdicts whose inputs are listed in full.
    """
    start = time.perf_counter()
    outcomes: list[Outcome] = []
    console = Console(width=120, markup=False, highlight=False)
    for outcome in tqdm(campaign(seed, range(first, first + count), processes), total=count, desc="fuzz"):
        outcomes.append(outcome)
        if outcome.verdict in show:
            console.print(f"#{outcome.index} {outcome.case}; {outcome.damage}\n{outcome.verdict}: {outcome.said}\n")
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    by_case = Counter((outcome.case, outcome.verdict) for outcome in outcomes)
    columns = [verdict for verdict in Verdict.__args__ if verdicts[verdict] or verdict in FAULTS]
    table = Table("", *columns, title=f"seed {seed}, {count} inputs, {time.perf_counter() - start:.0f} s")
    for case in sorted({outcome.case for outcome in outcomes}):
        table.add_row(case, *(str(by_case[case, verdict]) for verdict in columns))
    table.add_row("all", *(str(verdicts[verdict]) for verdict in columns), style="bold")
    console.print(table)
    sys.exit(any(verdicts[verdict] for verdict in FAULTS))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m tests.fuzz")
