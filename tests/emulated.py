"""Which cases of the longest tests belong to the quick tests.

Without a GPU, GPU kernels are emulated: Triton's interpreter runs Triton's, and the CUDA sources
are compiled for the CPU. This finds the same mistakes, a hundred to a thousand times slower. So
`make test` runs some cases of the longest tests, and `make test-all` runs all of them.

A test without an entry here runs all its cases in both. For a test and backend with an entry, the
cases whose parameters fully match the regular expression are quick; `tests/conftest.py` marks the
others `slow`. The parameters are the part of a test's id in brackets, without the backend.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from emu_kernels import backends
from emu_kernels.similarity import SIMILARITIES


class Quick(NamedTuple):
    test: str
    """File and name of the test, relative to tests/."""
    backend: str
    """The value of the parameter ``kernel`` or ``backend``; "" for a test without either."""
    stay: str
    """A regular expression for the parameters of the quick cases."""
    why: str


NONE = "(?!)"
"""Matches nothing: all cases of the backend are slow."""

QUICK = [
    # --- Triton, interpreted: about 10 ms for each row, each tile of candidates and each entity ---
    Quick(
        "ops/test_agreement.py::test_large_scores", "triton", r"3000\.0",
        "one of three shifts, the one whose terms nearly cancel",
    ),
    Quick(
        "ops/test_agreement.py::test_options", "triton",
        r"own-\{'(alpha|beta)': 0\.0\}|shared-\{'(reduction|row_offset)': .*"
        r"|(own|shared)-\{'mutation_rate': [01]\.0\}",
        "every option that makes a term or the mask vanish, and one of each other kind",
    ),
    Quick(
        "ops/test_agreement.py::test_table_dtypes", "triton", r"(?!one past).*",
        "every dtype, in the smaller size; test_loss has the other sizes",
    ),
    Quick(
        "ops/test_autograd.py::test_opcheck", "triton", NONE,
        "the operators are those of the other backends; to record the calls takes half a minute",
    ),
    Quick(
        "ops/test_autograd.py::test_autocast_changes_nothing", "triton",
        r".*-torch\.bfloat16-torch\.bfloat16",
        "every function once; autocast acts before a backend is called",
    ),
    Quick(
        "ops/test_bad_input.py::test_module", "triton", NONE,
        "the module calls the function, whose cases stay",
    ),
    Quick(
        "ops/test_compile.py::test_equals_eager", "triton", r".*-torch\.float32",
        "every function once; the graph is the same for all dtypes",
    ),
    *(
        Quick(
            f"ops/test_compile.py::{name}", "triton", NONE,
            "the graph is the same for all kernels; test_equals_eager and test_inductor stay",
        )
        for name in (
            "test_any_batch_size", "test_no_seed_draws_anew_at_each_call",
            "test_seed_int_does_not_recompile", "test_seed_tensor_does_not_recompile",
            "test_tensor_coefficients_do_not_recompile",
        )
    ),
    Quick(
        "ops/test_log_q.py::test_is_cross_entropy_of_corrected_logits", "triton",
        "(none|rate)-dot-6|(mixup|expected)-hake-2",
        "every rule once, the simplest similarity and the hardest",
    ),
    Quick(
        "ops/test_log_q.py::test_not_finite", "triton", "positive--inf|negative-nan",
        "each place once",
    ),
    Quick(
        "ops/test_mask.py::test_columns_past_16_bits", "triton", NONE,
        "65,576 columns; the counter of a column is one word in every kernel",
    ),
    Quick(
        "ops/test_memory.py::test_saved_for_backward_of_similarities", "triton", "dot|hake",
        "the fewest and the most sums that a similarity keeps",
    ),
    Quick(
        "ops/test_not_finite.py::test_loss", "triton",
        r"query-nan-.*-options[04]|positive-inf-.*-options[12]|negative--inf-.*-options3",
        "each place with a value of its own, and every set of options once",
    ),
    Quick(
        "ops/test_not_finite.py::test_scores", "triton", r"query-nan|positive-inf|negative--inf",
        "each place and each value once",
    ),
    Quick(
        "ops/test_not_finite.py::test_overflow", "triton", r"query-1\.0|negative--1\.0",
        "both signs, a place each",
    ),
    Quick(
        "ops/test_relational.py::test_agrees_with_the_reference", "triton",
        r"part of a vector-(.*-(sum|pna)|transe-.*)-torch\.float32-triton"
        r"|several chunks of queries-distmult-pna-torch\.float32-triton"
        r"|several vectors-rotate-pna-torch\.float64-triton",
        "every message and aggregate in the smallest size; the larger ones, and doubles, once",
    ),
    Quick(
        "ops/test_semantics.py::test_layouts", "triton",
        r"strided_rows-21-torch\.float32|every_third_row-21-torch\.bfloat16"
        r"|transposed-1-torch\.float32",
        "each layout once, with both dtypes and both widths among them",
    ),
    Quick(
        "ops/test_semantics.py::test_sets_of_negatives", "triton", "1-True|3-False",
        "one set and several, with padding and without",
    ),
    Quick(
        "ops/test_similarities.py::test_rates_are_the_shares_that_mutate", "triton", NONE,
        "a share of many draws; other tests compare the masks bit for bit",
    ),
    Quick(
        "ops/test_similarities.py::test_loss", "triton",
        r".*-part of a vector-(rate|mixup|rates of pairs|expected)|(dot|hake)-.*",
        "every similarity with each kind of mutation; the simplest and the hardest with all",
    ),
    Quick(
        "ops/test_similarities.py::test_learned_rates", "triton", "(dot|hake)-row|rotate-component",
        "a similarity of each shape of terms; sums over rows are torch's",
    ),
    Quick(
        "ops/test_similarities.py::test_table_dtypes", "triton",
        r"(dot|hake)-torch\.bfloat16|(l1|rotate)-torch\.float16|(l2|protate)-torch\.float64",
        "every similarity once, every dtype twice",
    ),
    Quick(
        "ops/test_similarities.py::test_zero_distances", "triton",
        "(l1|hake)-rate|(l2|rotate|protate)-mixup|(l2|hake)-expected",
        "every similarity once, every mutation; the roots in closed form",
    ),
    Quick(
        "ops/test_similarities.py::test_scores_are_the_formulas", "triton", "dot|hake",
        "the simplest and the hardest; test_scores compares all with the specification",
    ),
    Quick(
        "ops/test_similarities.py::test_sparse_gradient_is_the_dense_one", "triton", "rotate",
        "two halves; test_sparse_gradient.py has dot, the case of one half",
    ),
    Quick(
        "ops/test_similarities.py::test_compiles_in_one_graph", "triton", "hake",
        "all optional arguments; the graph is the same for all kernels",
    ),
    Quick(
        "ops/test_sparse_gradient.py::test_equals_dense", "triton",
        r"fused_emu_loss-.*-torch\.float32|fused_softmax_loss-.*-torch\.bfloat16"
        r"|<lambda>-.*-torch\.float16",
        "every function once, every dtype of 32 bits or less",
    ),
    Quick(
        "ops/test_sparse_gradient.py::test_optimizers", "triton", NONE,
        "an optimizer gets the same kind of tensor from every backend",
    ),
    Quick(
        "triton/test_kernels.py::test_a_bad_id_makes_its_row_nan_and_is_raised_later", "",
        r"positive-9-dot|negative-(-2|\d{9,})-dot|negative-9-hake",
        "above, below and far above; both kinds of id; rows of one half and of two",
    ),
    Quick(
        "triton/test_kernels.py::test_any_tile", "",
        "one row after another-13-none|few of few-.*-mask",
        "both tiles, rows of one chunk and of several, with and without masks",
    ),
    Quick(
        "triton/test_presence.py::test_the_package_works_without_triton", "", "import triton",
        "one way to look for Triton of three",
    ),
    Quick(
        "bench/test_bench.py::test_eager_losses_are_the_fused_ones", "triton", "dot|hake",
        "it tests the eager losses, with each similarity on the other backends",
    ),
    # --- CUDA, compiled for the CPU ---
    Quick(
        "ops/test_compile.py::test_equals_eager", "cuda", r".*-torch\.float32",
        "every function once; the graph is the same for all dtypes",
    ),
    Quick(
        "ops/test_similarities.py::test_compiles_in_one_graph", "cuda", "hake",
        "all optional arguments; the graph is the same for all kernels",
    ),
    Quick(
        "ops/test_similarities.py::test_gradcheck", "cuda", "(dot|hake)-rate",
        "the simplest and the hardest; test_table_dtypes compares all gradients in fp64",
    ),
    Quick(
        "ops/test_similarities.py::test_loss", "cuda",
        "(?!.*-hubs-).*|(dot|hake)-hubs-(rate|mixup)",
        "all but the largest shape, and that with the simplest and the hardest similarity",
    ),
    # --- the specification ---
    Quick(
        "ops/test_similarities.py::test_compiles_in_one_graph", "reference", "dot",
        "it is traced into some hundred operators, and compiled in no training",
    ),
    Quick(
        "ops/test_compile.py::test_equals_eager", "reference", r".*-torch\.float32",
        "every function once; the graph is the same for all dtypes",
    ),
    # --- the trainer, about a second a run ---
    Quick(
        "trainer/test_loop.py::test_it_learns", "", "False-emu-.*|True-softmax-(DistMult|TransE)",
        "every model once; both losses and filtered negatives, with a product and a distance",
    ),
    Quick(
        "trainer/test_loop.py::test_every_sampler_trains_with_every_loss", "", "uniform-.*|.*-emu",
        "every sampler once, and every loss once",
    ),
]  # fmt: skip


def parameters(item: pytest.Item) -> dict[str, Any]:
    spec = getattr(item, "callspec", None)
    return {} if spec is None else spec.params


def backend_of(item: pytest.Item) -> str:
    given = parameters(item)
    return str(given.get("kernel", given.get("backend", "")))


def mark_slow(items: Sequence[pytest.Item]) -> list[str]:
    """Mark the cases that QUICK does not keep; return the entries that match no case."""
    rules = {(rule.test, rule.backend): rule for rule in QUICK}
    assert len(rules) == len(QUICK), "a test has two entries for one backend"
    unused = {rule: {"a case", "a case that stays"} for rule in QUICK}
    for item in items:
        test, _, rest = item.nodeid.removeprefix("tests/").partition("[")
        backend = backend_of(item)
        rule = rules.get((test, backend))
        if rule is None:
            continue
        unused[rule].discard("a case")
        if re.fullmatch(rule.stay, rest[:-1].removeprefix(backend).removeprefix("-")):
            unused[rule].discard("a case that stays")
        else:
            item.add_marker(pytest.mark.slow)
    return [
        f"{rule.test}, {rule.backend or 'no backend'}: there is no {missing}"
        for rule, kinds in unused.items()
        for missing in sorted(kinds)
        if rule.stay != NONE or missing == "a case"
    ]


def absent(items: Sequence[pytest.Item]) -> list[str]:
    """The pairs of a backend and a similarity that no quick test has."""
    quick = {
        (backend_of(item), parameters(item).get("similarity"))
        for item in items
        if item.get_closest_marker("slow") is None
    }
    return [
        f"no quick test has backend {backend!r} with similarity {similarity!r}"
        for backend in backends.NAMES
        for similarity in SIMILARITIES
        if (backend, similarity) not in quick
    ]
