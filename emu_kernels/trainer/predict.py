"""``emu-predict``: complete a triple with a trained model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from .data import SPLITS, Direction, Graph, split_triples
from .errors import TrainerError
from .models import Model
from .names import find
from .run import RunFolder


@dataclass(frozen=True)
class Prediction:
    """A candidate, its score, and the first split that holds the completed triple, if any."""

    entity: str
    score: float
    known: str | None


@torch.no_grad()
def predict(
    model: Model, graph: Graph, given: str, relation: str, direction: Direction, top: int
) -> list[Prediction]:
    """The `top` entities that score best as the tail of (given, relation, ?) where `direction`
    is "tail", else as the head of (?, relation, given).

    Raises:
        UnknownNameError: the graph holds no such entity or relation.
    """
    given_id = find("entity", given, graph.entities)
    relation_id = find("relation", relation, graph.relations)
    query = model.ask(model.entity[[given_id]], torch.tensor([relation_id]), direction)
    scores = model.score(query, model.candidates())[0]
    best = scores.topk(min(top, graph.num_entities))
    known: dict[int, str] = {}
    for split in SPLITS:
        givens, relations, targets = split_triples(graph.triples[split], direction)
        for target in targets[(givens == given_id) & (relations == relation_id)].tolist():
            known.setdefault(target, split)
    return [
        Prediction(graph.entities[i], score, known.get(i))
        for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``emu-predict``; returns the exit status, 1 after an error that a person can act on."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error(f"argument --top: expected at least 1, got {options.top}")
    try:
        run = RunFolder.open(options.run)
        graph = run.read_graph()
        model, state = run.load_model(graph)
        direction: Direction = "tail" if options.head is not None else "head"
        given = options.head if options.head is not None else options.tail
        predictions = predict(model, graph, given, options.relation, direction, options.top)
    except TrainerError as error:
        print(f"emu-predict: {error}", file=sys.stderr)
        return 1
    head, tail = (given, "?") if direction == "tail" else ("?", given)
    rows = [(i, p.entity, f"{p.score:.4f}", p.known or "") for i, p in enumerate(predictions, 1)]
    try:
        print(f"({head}, {options.relation}, {tail}), the model of step {state['step']}")
        print(tabulate(rows, ("", direction, "score", "known from"), disable_numparse=True))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emu-predict",
        description="Complete (head, relation, ?) or (?, relation, tail) with a trained model.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of emu-train")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--head", metavar="NAME", help="predict the tail of this head")
    given.add_argument("--tail", metavar="NAME", help="predict the head of this tail")
    parser.add_argument("--relation", metavar="NAME", required=True)
    parser.add_argument(
        "--top", type=int, default=10, metavar="K", help="how many to print (default 10)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
