"""A run as one HTML page that needs no other file, no network and no script."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import fields
from html import escape
from pathlib import Path
from string import Template

import matplotlib
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from emu_kernels.negatives import generator

from .breakdown import Line, by_kind, by_relation
from .checkpoint import write_atomically
from .config import Config
from .data import DIRECTIONS, Graph
from .evaluation import Metrics, Ranks
from .loop import Trainer, settle
from .models import SCORERS, Model, Scorer
from .report import lines_table, metrics_table, progress
from .settings import flag

_ENDS = 10  # relations shown at each end of the list
_FEW = 10  # a relation's MRR over fewer test triples says little
_POINTS = 3000  # entities drawn
_COLOURS = tuple(to_hex(f"C{i}") for i in (0, 1, 2, 3, 4, 5, 6, 9))  # of the most common roles
_OTHERS = "#cccccc"

# Names come from files, so they are escaped, and the browser is told to run and fetch nothing.
_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 sans-serif; color: #222; background: #fff }
body { max-width: 48rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem }
img { max-width: 100%; height: auto }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
th:first-child { text-align: left }
td:first-child { min-width: 7rem; overflow-wrap: anywhere }
ul { list-style: none; padding: 0; overflow-wrap: anywhere }
.dot { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .5rem }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def write_page(trainer: Trainer, model: Scorer, ranks: Ranks | None) -> Path:
    """Write the run's ``report.html``.

    Args:
        model: the best one, with all its parameters.
        ranks: those of the test split, as :meth:`Trainer.finish` returns them.
    """
    assert trainer.run is not None
    config = trainer.config
    graph = trainer.graph.of_split("test")
    name = config.dataset or Path(str(config.data)).name
    title = escape(f"{config.model} with {config.loss} on {name}")
    parts = [f"<p>{escape(trainer.graph.summary())}</p>"]
    if ranks:
        parts += _test(trainer, graph, ranks)
    parts += ["<h2>Training</h2>", _progress(trainer)]
    if ranks:
        ranked = trainer.evaluator.ranked("test")
        parts += _ranks(ranks) + _relations(by_relation(graph, ranked, ranks))
    if isinstance(model, Model) and model.entity.shape[1] > 1:
        parts += _entities(model.entity.detach(), graph, config.seed)
    parts += _settings(config, trainer.run.config_file)
    page = _PAGE.substitute(title=title, body="\n".join(parts))
    file = trainer.run.report_file
    write_atomically(file, lambda path: path.write_text(page, encoding="utf-8"))
    return file


def _test(trainer: Trainer, graph: Graph, ranks: Ranks) -> list[str]:
    config = trainer.config
    lines = by_kind(graph, trainer.evaluator.ranked("test"), ranks)
    rows = {"both directions": Metrics.of(ranks)}
    rows |= {f"{d}s": Metrics.from_ranks(ranks[d].cpu()) for d in DIRECTIONS}
    return [
        "<h2>Test</h2>",
        f"<p>Filtered ranking{config.ranked}, by the model of step {trainer.best_step:,}. MRR is "
        "the mean of 1 / rank, Hits@k the share of ranks up to k, MR the mean rank.</p>",
        _table(metrics_table(rows, "html")),
        "<p>By kind of relation: 1-n has many tails for a head, n-1 many heads for a tail.</p>",
        _table(lines_table(lines, "html")),
    ]


def _progress(trainer: Trainer) -> str:
    assert trainer.run is not None
    text = f"<p>{trainer.step:,} steps in {trainer.seconds:,.0f} s, without validation.</p>"
    return text + _image(progress(trainer.run.read_metrics()), "Loss and validation MRR over steps")


def _ranks(ranks: Ranks) -> list[str]:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="k", ylabel="Hits@k", ylim=(0, 1.02))
    for direction, of in ranks.items():
        rank, count = of.cpu().unique(return_counts=True)
        axes.step(rank, count.cumsum(0) / len(of), where="post", label=f"{direction}s")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return [
        "<h2>Ranks</h2>",
        "<p>The share of test triples whose true entity has a rank of k or better, for each k.</p>",
        _image(figure, "Hits@k over k, for tails and heads"),
    ]


def _relations(lines: list[Line]) -> list[str]:
    parts = ["<h2>Relations</h2>"]
    for text, part in relation_ends(lines):
        parts += [f"<p>{text}:</p>", _table(lines_table(part, "html"))]
    return [*parts, "<p><code>relations.csv</code> has all of them.</p>"]


def relation_ends(lines: list[Line]) -> list[tuple[str, list[Line]]]:
    """The best and the worst relations by MRR, two lists with titles; one list if there are few."""

    def mrr(line: Line) -> float:
        return sum(line.metrics[d].mrr for d in DIRECTIONS)

    often = [line for line in lines if line.triples >= _FEW]
    among = f" with {_FEW} test triples or more" if often else ""
    shown = sorted(often or lines, key=mrr, reverse=True)
    if len(shown) <= 2 * _ENDS:
        return [(f"Relations{among}, the best first", shown)]
    return [
        (f"The best {_ENDS} of {len(shown):,} relations{among}", shown[:_ENDS]),
        (f"The worst {_ENDS}, the worst first", shown[: -_ENDS - 1 : -1]),
    ]


def _entities(table: Tensor, graph: Graph, seed: int) -> list[str]:
    """Two principal components of entities, coloured by each entity's most common role."""
    draws = generator(torch.device("cpu"), seed, "report")
    drawn = torch.randperm(len(table), generator=draws)[:_POINTS]
    rows = table[drawn.to(table.device)].cpu().double()
    rows -= rows.mean(0)
    variance, vectors = torch.linalg.eigh(rows.T @ rows)
    first, second = (rows @ vectors[:, -2:]).flip(1).T
    shares = (variance[-2:] / variance.sum()).nan_to_num().flip(0).tolist()

    role = roles(graph, drawn)
    count = role[role >= 0].bincount(minlength=2 * graph.num_relations)
    common = [x for x in count.topk(min(len(_COLOURS), len(count))).indices.tolist() if count[x]]
    colours = dict(zip(common, _COLOURS, strict=False))
    order = torch.isin(role, torch.tensor(common)).int().argsort(stable=True)  # others below
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    points = [colours.get(kind, _OTHERS) for kind in role[order].tolist()]
    axes.scatter(first[order], second[order], c=points, s=8, rasterized=True)
    axes.set(xlabel=f"{shares[0]:.0%} of the variance", ylabel=f"{shares[1]:.0%}")
    legend = [
        f'<li><span class="dot" style="background: {colour}"></span>{escape(text)}</li>'
        for text, colour in [
            *((_name(graph, kind), colour) for kind, colour in colours.items()),
            ("other", _OTHERS),
        ]
    ]
    return [
        "<h2>Entities</h2>",
        f"<p>The first two principal components of {len(drawn):,} entities' embeddings. The colour "
        "is the role that an entity has most often in the training triples:</p>",
        f"<ul>{''.join(legend)}</ul>",
        _image(figure, "Two principal components of the entities' embeddings"),
    ]


def roles(graph: Graph, entities: Tensor) -> Tensor:
    """(P,) each entity's most common role in training: r for a head of relation r, R + r for a
    tail; -1 if it has no triples."""
    width = 2 * graph.num_relations
    place = torch.full((graph.num_entities,), -1)
    place[entities] = torch.arange(len(entities))
    head, relation, tail = graph.triples["train"].T
    at = place[torch.cat([head, tail])]
    role = torch.cat([relation, relation + graph.num_relations])
    pairs, times = (at * width + role)[at >= 0].unique(return_counts=True)
    most = torch.full((len(entities),), -1)
    most.scatter_reduce_(0, pairs // width, times * width + pairs % width, "amax")
    return torch.where(most < 0, -1, most % width)


def _name(graph: Graph, role: int) -> str:
    side = "head" if role < graph.num_relations else "tail"
    return f"{side} of {graph.relations[role % graph.num_relations]}"


def _settings(config: Config, file: Path) -> list[str]:
    default = {f.name: f.default for f in fields(config)} | SCORERS[config.model].defaults
    # What follows from the graph, the model and the loss was not given, either.
    chosen = {x: getattr(config, x) for x in ("dataset", "data", "model", "loss", "device")}
    resolved = settle(Config(**chosen)).to_json()
    default |= {x: y for x, y in resolved.items() if default[x] is None and x not in chosen}
    rows = {True: list[list[str]](), False: list[list[str]]()}
    for name, value in config.to_json().items():
        rows[value != default[name]].append([flag(name), "" if value is None else str(value)])
    versions = json.loads(file.read_text())["versions"]
    return [
        "<h2>Settings</h2>",
        f"<p>{escape(', '.join(f'{k} {v}' for k, v in versions.items()))}. Settings that are not "
        "the defaults:</p>",
        _table(tabulate(rows[True], tablefmt="html", disable_numparse=True)),
        "<details><summary>The others</summary>",
        _table(tabulate(rows[False], tablefmt="html", disable_numparse=True)),
        "</details>",
    ]


def _table(html: str) -> str:
    return f'<div class="wide">{html}</div>'


def _image(figure: Figure, alt: str) -> str:
    file = io.BytesIO()
    # Text instead of outlines of letters, and ids that are the same each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "emu"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'
