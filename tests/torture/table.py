"""Faults and what came of them, counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cases import Case
from forked import Outcome


@dataclass
class Table:
    """fault -> outcome -> count; an outcome that was not promised begins with BROKEN."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    """What was not promised, in full."""

    def add(self, fault: str, outcome: str, *problems: str) -> None:
        """`problems`: what speaks against the outcome."""
        if problems:
            self.broken.append(f"{fault}: {outcome}, but " + "; ".join(problems))
            print(f"BROKEN {self.broken[-1]}", flush=True)
            outcome = f"BROKEN: {outcome}"
        self.counts.setdefault(fault, Counter())[outcome] += 1

    def to_text(self) -> str:
        rows = [("fault", "outcome", "times")]
        for fault, outcomes in self.counts.items():
            for number, (outcome, count) in enumerate(sorted(outcomes.items())):
                rows.append((fault if number == 0 else "", outcome, str(count)))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"| {fault:{widths[0]}} | {outcome:{widths[1]}} | {count:>{widths[2]}} |" for fault, outcome, count in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths[:2]) + "|" + "-" * (widths[2] + 1) + ":|")
        total = sum(sum(outcomes.values()) for outcomes in self.counts.values())
        return "\n".join([*lines, "", f"{total} faults caused, {len(self.broken)} ended otherwise than promised."])

    def write(self, work: Path) -> None:
        content = {"counts": self.counts, "broken": self.broken}
        (work / "torture.json").write_text(json.dumps(content, indent=2) + "\n")
        (work / "torture.txt").write_text("\n".join([self.to_text(), *self.broken]) + "\n")


def not_clean(outcome: Outcome, case: Case, *statuses: int) -> list[str]:
    """What speaks against an end in one line and with one of these statuses."""
    found = []
    if outcome.status not in statuses:
        found.append(f"status {outcome.status}, expected {' or '.join(map(str, statuses))}")
    if not re.search(rf"(^|\]){case.prog}: ", outcome.last_line):  # ] ends a progress bar that was cut off at its birth
        found.append(f"the last line is {outcome.last_line!r}")
    noise = [sign for sign in ("Traceback", "Exception ignored", "Exception in") if sign in outcome.errors]
    if noise:
        found.append(f"it wrote {outcome.errors[outcome.errors.index(noise[0]) :][-1500:]}")
    return found


def not_recovered(case: Case) -> list[str]:
    """Run the command again, without the fault: what is not as after an uninterrupted run."""
    outcome = case.run()
    if outcome.status != case.status:
        return [f"run again, it ended with status {outcome.status}: {outcome.errors[-1500:]}"]
    different = case.differences()
    return [f"run again, these differ from an uninterrupted run: {different[:5]}"] if different else []
