"""What became of the rows of files: how many are used, which are left out and why."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN = 5
"""Number of examples that a report keeps per reason."""


@dataclass
class DataReport:
    """Used rows by data set; rows left out by reason, with the first few ``file:line: what``; and notes."""

    used: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, what: str, count: int = 1) -> None:
        """Count ``count`` rows, with ``what`` as an example."""
        self.left_out[reason] = self.left_out.get(reason, 0) + count
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN:
            shown.append(what)

    def add(self, other: DataReport) -> None:
        """Add the counts of another report."""
        for name, count in other.used.items():
            self.used[name] = self.used.get(name, 0) + count
        for reason, count in other.left_out.items():
            self.left_out[reason] = self.left_out.get(reason, 0) + count
            self.examples[reason] = [*self.examples.get(reason, []), *other.examples[reason]][:SHOWN]
        self.notes += [note for note in other.notes if note not in self.notes]

    def lines(self) -> list[str]:
        """Readable text: one line about used rows, then each reason with its examples, then the notes."""
        names = ", ".join(f"{name} {count}" for name, count in self.used.items())
        found = [f"data: {sum(self.used.values())} rows ({names})" if names else "data: 0 rows"]
        for reason, count in self.left_out.items():
            found.append(f"left out, {reason}: {count} row(s)")
            found += [f"  {what}" for what in self.examples[reason]]
            if count > len(self.examples[reason]):
                found.append(f"  and {count - len(self.examples[reason])} more")
        return found + [f"note: {note}" for note in self.notes]
