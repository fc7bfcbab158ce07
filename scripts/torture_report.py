"""The report of a subcommand of ``torture.py``: a table with counts, and each case that isn't right."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence


def report(table: Mapping[str, Counter[str]], outcomes: Sequence[str], wrong: Iterable[str], as_json: bool) -> None:
    """Print the outcomes of each kind of case, and a line for each wrong one, which names its seed."""
    total = Counter[str]()
    for counts in table.values():
        total.update(counts)
    if as_json:
        print(json.dumps({"counts": table, "total": total, "wrong": [*wrong]}))
        return
    print("| | " + " | ".join(outcomes) + " |\n" + "| --- " * (len(outcomes) + 1) + "|")
    for name, counts in [*sorted(table.items()), ("**in all**", total)]:
        print(f"| {name} | " + " | ".join(str(counts[each]) for each in outcomes) + " |")
    for line in wrong:
        print(line)
