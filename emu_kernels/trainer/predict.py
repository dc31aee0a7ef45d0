"""``emu-predict``, and predictions from Python: a trained model completes triples."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import embedding

from emu_kernels import emu_scores, validate

from .data import PARTS, SPLITS, Direction, split_triples
from .errors import DataError, TrainerError
from .models import Model, Query, Score
from .names import find, visible
from .run import RunFolder
from .terminal import degrade_output, discard_output

FORMATS = ("table", "csv", "jsonl")

PartialTriple = Sequence["str | None"]
"""Head, relation and tail by name; None for the one to predict."""

_FLOATS = 1 << 25  # numbers computed at once: 128 MiB


class Prediction(NamedTuple):
    """A triple: one of the best completions of a query, or a whole triple that was given."""

    rank: int | None  # among the query's predictions, from 1; None for a triple that was given
    head: str
    relation: str
    tail: str
    score: float
    known: str | None  # the first split that holds the triple


class Neighbour(NamedTuple):
    """An entity near another."""

    rank: int  # from 1
    entity: str
    neighbour: str
    score: float


class Predictor:
    """The best model of a run, with names. Its tables are the run's files, mapped into memory.

    If relations have inverses, heads are predicted by the inverse relation. Scores of whole triples
    and of relations are those of predicting the tail. A run with a second graph to test on predicts
    that graph's triples.

    Args:
        run: a run folder of ``emu-train``.
        device: where to compute.

    Attributes:
        graph: names and triples; an entity's index in ``graph.entities`` is its row in the model.
        model: the two tables, or other parameters, without gradients.
        step: the training step that the model is from.

    Raises:
        RunError: the folder holds no run, or one without a checkpoint so far.
    """

    def __init__(self, run: str | os.PathLike[str], device: str = "cpu") -> None:
        folder = RunFolder.open(Path(run))
        graph = folder.read_graph()
        model, state = folder.load_model(graph)
        self.graph = graph.of_split("test")
        self.model = model.to(device).requires_grad_(False)
        self.step: int = state["step"]

    def predict(
        self,
        head: str | Sequence[str] | None = None,
        relation: str | Sequence[str] | None = None,
        tail: str | Sequence[str] | None = None,
        k: int = 10,
        *,
        filter_known: bool = False,
    ) -> list[Prediction]:
        """The k best completions of (head, relation, ?), (?, relation, tail) or (head, ?, tail).

        Give two of the three; each is a name, or a list with a name for each query.
        ``pandas.DataFrame`` makes a table of the result.

        Args:
            filter_known: leave out what any split of the graph holds, which may leave fewer than k.

        Returns:
            Query by query, the best first.

        Raises:
            UnknownNameError: the graph holds no such entity or relation; says which are similar.
            TypeError: a name that is no str, also of an entity that is numbered.
            ValueError: not exactly two are given, lists differ in length, or k is below 1.
        """
        parts = (head, relation, tail)
        for name, part in zip(PARTS, parts, strict=True):
            _check_names(name, part)
        if sum(part is None for part in parts) != 1:
            raise ValueError("give two of head, relation and tail, to predict the third")
        counts = {len(x) for x in parts if x is not None and not isinstance(x, str)}
        if len(counts) > 1:
            raise ValueError(f"expected as many names in each list, got {sorted(counts)}")
        count = counts.pop() if counts else 1
        columns = [[x] * count if x is None or isinstance(x, str) else x for x in parts]
        return self.complete(list(zip(*columns, strict=True)), k, filter_known=filter_known)

    def relations(
        self, head: str, tail: str, k: int = 10, *, filter_known: bool = False
    ) -> list[Prediction]:
        """The k relations that score best between a head and a tail; see :meth:`predict`."""
        return self.predict(head=head, tail=tail, k=k, filter_known=filter_known)

    @torch.no_grad()
    def complete(
        self, triples: Sequence[PartialTriple], k: int = 10, *, filter_known: bool = False
    ) -> list[Prediction]:
        """The k best completions of each triple, in the order of the triples.

        Args:
            triples: each is (head, relation, tail) with None for one of them, or a whole triple,
                which is scored, and returned even if it is known.
            filter_known, k: see :meth:`predict`.

        Raises:
            UnknownNameError: the graph holds no such entity or relation; says which are similar.
            ValueError: a triple lacks more than one part, or k is below 1.
        """
        validate.at_least(1, "k", k)
        ids = self._ids(triples)
        found: list[list[Prediction]] = [[] for _ in triples]
        for part in range(3):
            places = (ids[:, part] < 0).nonzero()[:, 0]
            dim, count = self._width, len(self._names(part))
            all_known = self._known(ids[places], part)
            width = count * dim if part == 1 else count + dim
            for start, chunk in _chunks(places, width):
                of_chunk = all_known[start : start + len(chunk)]
                best = self._best(ids[chunk], part, k, of_chunk if filter_known else None)
                for i, known, (scores, answers) in zip(chunk.tolist(), of_chunk, best, strict=True):
                    triple = ids[i].tolist()
                    for rank, (score, answer) in enumerate(zip(scores, answers, strict=True), 1):
                        triple[part] = answer
                        found[i].append(self._named(rank, triple, score, known.get(answer)))
        places = (ids >= 0).all(dim=1).nonzero()[:, 0]
        given = ids[places]
        scored = zip(self._score(given).tolist(), self._known(given, 2), strict=True)
        for i, (score, known) in zip(places.tolist(), scored, strict=True):
            triple = ids[i].tolist()
            found[i].append(self._named(None, triple, score, known.get(triple[2])))
        return [prediction for of_query in found for prediction in of_query]

    @torch.no_grad()
    def score(self, triples: Sequence[Sequence[str]]) -> Tensor:
        """(M,) fp32: the score of each (head, relation, tail), as used to rank its tail.

        Raises:
            UnknownNameError: the graph holds no such entity or relation; says which are similar.
            ValueError: a triple lacks a name.
        """
        ids = self._ids(triples)
        if bool((ids < 0).any()):
            raise ValueError("triples: expected no None; complete() predicts what is missing")
        return self._score(ids)

    @torch.no_grad()
    def neighbours(self, entity: str | Sequence[str], k: int = 10) -> list[Neighbour]:
        """The k entities nearest to an entity, or to each of several.

        The score is minus the model's own distance, or the cosine if the model has a dot product.

        Raises:
            UnknownNameError: the graph holds no such entity; says which are similar.
            ValueError: k is below 1.
            TrainerError: the model has no embeddings.
        """
        validate.at_least(1, "k", k)
        model = self.model
        if not isinstance(model, Model):
            raise TrainerError(
                f"{type(model).__name__} has no embeddings by which to find neighbours"
            )
        _check_names("entity", entity)
        names = [entity] if isinstance(entity, str) else list(entity)
        ids = torch.tensor([find("entity", name, self.graph.entities) for name in names]).long()
        found: list[Neighbour] = []
        for start, chunk in _chunks(ids, len(self.graph.entities)):
            rows = self._candidates[chunk.to(model.device)]
            scores = model.score(Query(rows), self._candidates)
            if model.similarity == "dot":
                scores /= rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
                scores /= self._norms
            own = [[i] for i in chunk.tolist()]
            for name, best in zip(names[start:], _top(scores, k, own), strict=False):
                found += [
                    Neighbour(rank, name, self.graph.entities[i], score)
                    for rank, (score, i) in enumerate(zip(*best, strict=True), 1)
                ]
        return found

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: all but the scoring function, which is made again."""
        return {name: x for name, x in vars(self).items() if name != "_scorer"}

    @property
    def _width(self) -> int:
        """How many floats a query takes, besides its scores."""
        return self.model.entity.shape[1] if isinstance(self.model, Model) else 1

    @cached_property
    def _scorer(self) -> Score:
        return self.model.scorer(self.graph)

    @cached_property
    def _candidates(self) -> Tensor:
        assert isinstance(self.model, Model)
        return self.model.candidates()

    @cached_property
    def _norms(self) -> Tensor:
        return self._candidates.norm(dim=1).clamp(min=1e-30)

    def _names(self, part: int) -> Sequence[str]:
        return self.graph.relations if part == 1 else self.graph.entities

    def _named(
        self, rank: int | None, triple: list[int], score: float, known: str | None
    ) -> Prediction:
        head, relation, tail = (self._names(part)[i] for part, i in enumerate(triple))
        return Prediction(rank, head, relation, tail, score, known)

    def _ids(self, triples: Sequence[PartialTriple]) -> Tensor:
        """(Q, 3) int64 on the CPU, −1 for what is to be predicted."""
        ids = torch.full((len(triples), 3), -1)
        for i, triple in enumerate(triples):
            if len(triple) != 3 or sum(name is None for name in triple) > 1:
                raise ValueError(
                    "expected (head, relation, tail) with at most one None, "
                    f"got {tuple(triple)} as triple {i}"
                )
            for part, name in enumerate(triple):
                if name is not None:
                    kind = "relation" if part == 1 else "entity"
                    ids[i, part] = find(kind, name, self._names(part))
        return ids

    def _known(self, ids: Tensor, part: int) -> list[dict[int, str]]:
        """For each of the (Q, 3) queries its known answers, each with the first split it is in."""
        a, b = (other for other in range(3) if other != part)
        size = max(len(self.graph.entities), len(self.graph.relations))
        pairs, place = (ids[:, a] * size + ids[:, b]).unique(return_inverse=True)
        answers: list[dict[int, str]] = [{} for _ in pairs]
        for split in SPLITS if len(pairs) else ():
            triples = self.graph.triples[split]
            theirs = triples[:, a] * size + triples[:, b]
            at = torch.searchsorted(pairs, theirs).clamp_(max=len(pairs) - 1)
            hit = pairs[at] == theirs
            for pair, answer in zip(at[hit].tolist(), triples[hit, part].tolist(), strict=True):
                answers[pair].setdefault(answer, split)
        return [answers[i] for i in place.tolist()]

    def _best(
        self, ids: Tensor, part: int, k: int, known: list[dict[int, str]] | None
    ) -> Iterator[tuple[list[float], list[int]]]:
        """For each of the (Q, 3) queries, scores and ids of its best answers."""
        if part == 1:
            count = len(self.graph.relations)
            whole = ids.repeat_interleave(count, dim=0)
            whole[:, 1] = torch.arange(count).repeat(len(ids))
            scores = self._score(whole).view(-1, count)
        else:
            direction: Direction = "tail" if part == 2 else "head"
            given, relation, _ = split_triples(ids.to(self.model.device), direction)
            scores = self._scorer(given, relation, direction)
        return _top(scores, k, known)

    def _score(self, ids: Tensor) -> Tensor:
        """(M,): the score of each of the (M, 3) triples."""
        scores = [torch.empty(0)]
        model = self.model
        if not isinstance(model, Model):
            for _, chunk in _chunks(ids, len(self.graph.entities)):
                head, relation, tail = chunk.to(model.device).T
                of_all = self._scorer(head, relation, "tail")
                scores.append(of_all.gather(1, tail[:, None])[:, 0].cpu())
            return torch.cat(scores)
        for _, chunk in _chunks(ids, 2 * self._width):
            head, relation, tail = chunk.to(model.device).T
            query = model.ask(embedding(head, model.entity), relation, "tail")
            none = tail.new_empty((0,))
            phi = model.phi(query)
            of_chunk = emu_scores(
                query.vector, self._candidates, tail, none, mutation_rate=None, **phi
            )
            scores.append(of_chunk.positive.cpu())
        return torch.cat(scores)


def _chunks(rows: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of the rows, and where each begins; results of ``width`` floats a row stay small."""
    size = max(1, _FLOATS // width)
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def _top(
    scores: Tensor, k: int, left_out: Sequence[Iterable[int]] | None
) -> Iterator[tuple[list[float], list[int]]]:
    """For each row of the scores (Q, C) the k best and their columns, without those left out."""
    if left_out is not None:
        places = [(row, column) for row, columns in enumerate(left_out) for column in columns]
        row, column = torch.tensor(places, device=scores.device).long().reshape(-1, 2).T
        scores[row, column] = float("-inf")
    best = scores.topk(min(k, scores.shape[1]))
    for values, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        count = sum(value > float("-inf") for value in values)
        yield values[:count], ids[:count]


def _check_names(what: str, given: object) -> None:
    if given is not None and not hasattr(given, "__len__"):
        raise TypeError(
            f"{what}: expected a name (str) or a list of names, got {type(given).__name__}"
        )


def read_triples(lines: Iterable[str], *, comma: bool) -> list[PartialTriple]:
    """Triples, one a line, with None for a field that is empty or a question mark.

    Args:
        comma: read CSV, whose first line is skipped if it is "head,relation,tail"; otherwise fields
            are separated by tabs, as in the files that a graph is read from.

    Raises:
        DataError: a line does not have three fields, at least two of them given; says which line.
    """
    rows = csv.reader(lines) if comma else (line.rstrip("\r\n").split("\t") for line in lines)
    triples: list[PartialTriple] = []
    for number, fields in enumerate(rows, 1):
        if fields in ([], [""]) or (number == 1 and tuple(fields) == PARTS):
            continue
        triple = [None if field in ("", "?") else field for field in fields]
        if len(triple) != 3 or triple.count(None) > 1:
            raise DataError(
                f"line {number}: expected head, relation and tail separated by "
                f"{'commas' if comma else 'tabs'}, at most one of them empty or ?, got {fields}"
            )
        triples.append(triple)
    return triples


def _read(path: Path) -> list[PartialTriple]:
    comma = path.suffix.lower() == ".csv"
    try:
        if path == Path("-"):
            mark = "\ufeff"
            lines = (x if i else x.removeprefix(mark) for i, x in enumerate(sys.stdin))
            return read_triples(lines, comma=comma)
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return read_triples(stream, comma=comma)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except DataError as error:
        raise DataError(f"{path}, {error}") from error


def _write(rows: Sequence[Prediction | Neighbour], form: str, title: str, shown: list[str]) -> None:
    """Print a table of some columns below its title, or CSV or JSON with all of them."""
    if form == "table":
        body = [
            [
                f"{x:.4f}" if isinstance(x, float) else visible(x)
                for x in (getattr(row, c) for c in shown)
            ]
            for row in rows
        ]
        print(title)
        print(tabulate(body, shown, disable_numparse=True, missingval=""))
        return
    # Nine digits distinguish all fp32 numbers.
    records = [row._asdict() | {"score": float(f"{row.score:.9g}")} for row in rows]
    if form == "jsonl":
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
    else:
        columns = rows[0]._fields if rows else Prediction._fields
        table = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(records)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``emu-predict``; returns the exit status, 1 after an error that a person can act on."""
    degrade_output()
    parser = _parser()
    options = parser.parse_args(arguments)
    parts = [options.head, options.relation, options.tail]
    given = sum(part is not None for part in parts)
    if (given > 0) + (options.input is not None) + (options.neighbours is not None) != 1:
        parser.error("give two of --head, --relation and --tail, or --input, or --neighbours")
    if given == 1:
        parser.error("give two of --head, --relation and --tail, to predict the third, or all")
    if options.top < 1:
        parser.error(f"argument --top: expected at least 1, got {options.top}")
    rows: Sequence[Prediction | Neighbour]
    try:
        predictor = Predictor(options.run)
        if options.neighbours is not None:
            rows = predictor.neighbours(options.neighbours, options.top)
            title, shown = f"near {options.neighbours}", ["rank", "neighbour", "score"]
        else:
            triples = [parts] if options.input is None else _read(options.input)
            rows = predictor.complete(triples, options.top, filter_known=options.filter_known)
            title, shown = f"{len(triples)} queries", list(Prediction._fields)
            if options.input is None:
                title = f"({', '.join(part or '?' for part in parts)})"
                missing = [name for name, part in zip(PARTS, parts, strict=True) if part is None]
                shown = ["rank", *missing, "score", "known"] if missing else ["score", "known"]
    except TrainerError as error:
        print(f"emu-predict: {error}", file=sys.stderr)
        return 1
    try:
        _write(rows, options.format, f"{title}, the model of step {predictor.step}", shown)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        discard_output()
    except OSError as error:
        print(f"emu-predict: the output cannot be written: {error}", file=sys.stderr)
        discard_output()
        return 1
    return 0


EXAMPLES = """\
examples:
  emu-predict runs/mine --head Bonn --relation "capital of"
  emu-predict runs/mine --head Bonn --tail Germany
  emu-predict runs/mine --input queries.tsv --top 3 --filter-known --format csv
  emu-predict runs/mine --neighbours Bonn
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emu-predict",
        description="Complete triples with a trained model: give two parts to predict the\n"
        "third, or all three to score it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of emu-train")
    for part in PARTS:
        parser.add_argument(f"--{part}", metavar="NAME")
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="triples to complete or score, one a line: head, relation and tail, at most one of "
        "them empty or ?; separated by tabs, or by commas in a .csv; - for standard input",
    )
    parser.add_argument("--neighbours", metavar="NAME", help="the entities nearest to this one")
    parser.add_argument(
        "--top", type=int, default=10, metavar="K", help="how many for each query (default 10)"
    )
    parser.add_argument(
        "--filter-known", action="store_true", help="leave out what the graph holds already"
    )
    parser.add_argument("--format", choices=FORMATS, default="table", help="(default table)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
