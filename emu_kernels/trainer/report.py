"""Results as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from .evaluation import Metrics


def metrics_table(rows: dict[str, Metrics], **columns: Sequence[str]) -> str:
    """A row for each named result, further columns at the end."""
    header = ["", "MRR", "Hits@1", "Hits@3", "Hits@10", "MR", *columns]
    body = [
        [
            name,
            *(f"{x:.4f}" for x in (m.mrr, m.hits_at_1, m.hits_at_3, m.hits_at_10)),
            f"{m.mr:.1f}",
            *(column[i] for column in columns.values()),
        ]
        for i, (name, m) in enumerate(rows.items())
    ]
    align = ["left", *["right"] * (len(header) - 1)]
    return tabulate(body, header, disable_numparse=True, colalign=align)
