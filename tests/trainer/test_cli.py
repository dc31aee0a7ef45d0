"""The commands `emu-train` and `emu-predict`."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emu_kernels.trainer import cli, predict
from emu_kernels.trainer.loop import Trainer, duration
from emu_kernels.trainer.losses import LOSSES
from emu_kernels.trainer.run import RunFolder
from tests.trainer.support import QUICK, train


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing it takes longer than the few steps of a test."""
    monkeypatch.setattr(cli, "write_page", lambda *_: "none")


@pytest.fixture
def run_folder(graph_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run"
    assert train("--data", graph_folder, "--run-dir", path, *QUICK) == 0
    return path


def test_train_prints_and_leaves_results(graph_folder, tmp_path, capsys):
    run_folder = tmp_path / "run"
    assert train("--data", graph_folder, "--run-dir", run_folder, *QUICK) == 0
    out = capsys.readouterr().out
    assert "48 entities, 4 relations; triples: 900 train, 100 valid, 100 test" in out
    summary = " ".join(out.split())
    assert "EMU (mutation rate 0.6094, mask unit component, beta 0.53, alpha 0.11)" in summary
    assert "Hits@10" in out
    assert re.search(r"^n-n +100 ", out, re.M)  # its relations lead from clusters to clusters
    assert f"emu-predict {run_folder}" in out
    assert (run_folder / "best.safetensors").exists()


def test_one_file_is_trained_on_by_rows_and_ranked_in_part(tmp_path, named_triples, capsys):
    file, run_folder = tmp_path / "all.csv", tmp_path / "run"
    lines = ["object,predicate,subject", *(",".join(t[::-1]) for t in named_triples["train"])]
    file.write_text("\n".join(lines))
    options = ["--columns", "subject,predicate,object", "--hold-out", "0.1", "--split-seed", "3"]
    options += ["--sparse", "--optimizer", "RowwiseAdagrad", "--eval-triples", "20"]
    options += ["--eval-candidates", "10", "--run-dir", run_folder]
    assert train("--data", file, *options, *QUICK) == 0
    out = capsys.readouterr().out
    assert "48 entities, 4 relations; triples: 720 train, 90 valid, 90 test" in out
    assert "both directions, a sample of 20 triples, among 10 drawn entities, the model of" in out
    assert train("--resume", run_folder, "--steps", "60") == 0
    config = json.loads((run_folder / "config.json").read_text())["config"]
    assert (config["hold_out"], config["eval_candidates"], config["steps"]) == (0.1, 10, 60)
    assert predict.main([str(run_folder), "--head", "e1", "--relation", "r1"]) == 0


def test_train_by_name(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EMU_KERNELS_DATA", str(data_folder))
    monkeypatch.chdir(tmp_path)
    assert train("--dataset", "nations", "--loss", "softmax", *QUICK) == 0
    assert "14 entities, 55 relations" in capsys.readouterr().out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("nations-DistMult-softmax-")


def test_runs_of_the_same_second_have_folders_of_their_own(graph_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    for _ in range(3):
        assert train("--data", graph_folder, *QUICK) == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"graph-DistMult-emu-now{suffix}" for suffix in ("", "-2", "-3")]


def test_a_terminal_without_the_letters(graph_folder, tmp_path, monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    data = graph_folder.rename(graph_folder.with_name("gräf"))
    assert train("--data", data, "--run-dir", tmp_path / "β", *QUICK) == 0
    assert b"run folder: " in file.getvalue()
    assert b"/?\n" in file.getvalue()


def test_a_finished_run_is_resumed(run_folder, capsys):
    lines = (run_folder / "metrics.jsonl").read_text()
    assert train("--resume", run_folder) == 0
    assert "Hits@10" in capsys.readouterr().out
    assert (run_folder / "metrics.jsonl").read_text() == lines
    assert not (run_folder / "entities.tsv").exists()
    by_relation = (run_folder / "relations.csv").read_bytes()
    (run_folder / "relations.csv").unlink()
    assert train("--resume", run_folder, "--tsv") == 0
    assert (run_folder / "relations.csv").read_bytes() == by_relation
    assert len((run_folder / "entities.tsv").read_text().splitlines()) == 48


def test_seeds(graph_folder, tmp_path, capsys):
    runs = tmp_path / "runs"
    command = ["--data", graph_folder, "--seeds", 3, "--seed", 4, "--run-dir", runs, *QUICK]
    assert train(*command) == 0
    out = capsys.readouterr().out
    folders = [RunFolder(runs / f"seed-{seed}") for seed in (4, 5, 6)]
    mrr = [folder.read_metrics()[-1]["mrr"] for folder in folders]
    assert len({*mrr}) == 3
    assert f"{statistics.mean(mrr):.4f} ± {statistics.stdev(mrr):.4f}" in out.splitlines()[-1]
    alone = tmp_path / "alone"
    assert train("--data", graph_folder, "--seed", 5, "--run-dir", alone, *QUICK) == 0
    assert RunFolder(alone).read_metrics()[-1]["mrr"] == mrr[1]
    # Goes on: to one seed more, and to more steps.
    assert train(*command, "--seeds", 4) == 0
    assert "± " in capsys.readouterr().out.splitlines()[-1]
    assert [folder.read_metrics()[-1]["mrr"] for folder in folders] == mrr
    assert train(*command, "--seeds", 1, "--steps", 60) == 0
    assert folders[0].read_metrics()[-1]["step"] == 60
    assert train(*command, "--dim", 12) == 1
    assert "seed-4 is a run with --dim 8, not 12" in capsys.readouterr().err
    assert train(*command, "--lr", 0.7) == 1  # that --resume would take
    assert "not 0.7: give another --run-dir" in capsys.readouterr().err
    assert train(*command[: -len(QUICK)]) == 1  # also what is left out counts
    assert "seed-4 is a run with --batch-size 64, not 1000" in capsys.readouterr().err
    assert train("--data", graph_folder, "--seeds", 2) == 1
    assert "--seeds needs a number of at least 1, and --run-dir" in capsys.readouterr().err


def test_another_rate_after_a_run_went_wrong(run_folder):
    assert train("--resume", run_folder, "--lr", "0.01", "--steps", "60") == 0
    record = json.loads((run_folder / "config.json").read_text())
    assert record["history"] == [{"step": 40, "lr": 0.01, "steps": 60}]
    assert record["config"]["lr"] == 0.01
    assert train("--resume", run_folder, "--steps", "80") == 0
    record = json.loads((run_folder / "config.json").read_text())
    assert record["history"][1:] == [{"step": 60, "steps": 80}]


def test_a_closed_pipe_ends_only_the_printing(graph_folder, tmp_path):
    command = [sys.executable, "-m", "emu_kernels.trainer.cli", "--data", str(graph_folder)]
    command += ["--run-dir", str(tmp_path / "run"), *QUICK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 0
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors
    assert (tmp_path / "run" / "embeddings.safetensors").exists()


def test_progress_bar_on_a_terminal(graph_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert train("--data", graph_folder, "--run-dir", tmp_path / "run", *QUICK) == 0
    bar = capsys.readouterr().err
    assert "triple/s" in bar
    assert "loss" in bar
    assert "DistMult emu" in bar


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere"], "nowhere: no such folder or archive"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
        (["--data", "{graph}", "--mutation-rate", "2"], "mutation_rate must be in [0, 1]"),
        (["--data", "{graph}", "--device", "abacus"], "cannot run on device 'abacus'"),
        (["--data", "{graph}", "--device", "meta"], "cannot run on device 'meta'"),
        (["--data", "{graph}", "--run-dir", "{graph}/train.txt/run"], "cannot be made"),
    ],
)
def test_bad_input_is_one_clear_line(graph_folder, tmp_path, capsys, arguments, said):
    arguments = [argument.format(graph=graph_folder) for argument in arguments]
    if "--run-dir" not in arguments and "--data" in arguments:
        arguments += ["--run-dir", str(tmp_path / "run")]
    assert train(*arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("emu-train: ")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["--dataset", "FB15k"], ["--data", "x", "--model", "X"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        train(*arguments)
    assert caught.value.code == 2
    assert "usage: emu-train" in capsys.readouterr().err


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train("--help")
    out = " ".join(capsys.readouterr().out.split())
    for said in ("(default 0.61)", "0.001 for RotatE; otherwise 0)", "--resume RUN"):
        assert said in out
    for said in ("distmult-fb15k-237", "--loss {emu,expected,", "sampled softmax", "--hops X"):
        assert said in out


def test_the_beginning_of_an_option_is_no_option(capsys):
    with pytest.raises(SystemExit):
        train("--dataset", "umls", "--mutation-rat", "0.3")
    assert "unrecognized arguments: --mutation-rat" in capsys.readouterr().err


def test_a_word_in_the_place_of_a_number(graph_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train("--negatives", "some")
    assert "argument --negatives: invalid int or all value: 'some'" in capsys.readouterr().err
    chosen = ("--negatives", "all", "--loss", "expected")
    assert train("--data", graph_folder, "--run-dir", tmp_path / "run", *QUICK, *chosen) == 0
    assert "all entities as negatives" in capsys.readouterr().out


def test_a_loss_from_outside(graph_folder, tmp_path, monkeypatch, capsys):
    """An entry that is added to the registry is on the command line."""
    monkeypatch.setitem(LOSSES, "mine", dataclasses.replace(LOSSES["uls"], help="my own"))
    with pytest.raises(SystemExit):
        train("--help")
    assert "mine (my own)" in " ".join(capsys.readouterr().out.split())
    path = tmp_path / "run"
    assert train("--data", graph_folder, "--run-dir", path, *QUICK, "--loss=mine", "--beta=1") == 0
    assert "my own (beta 1, alpha 0.11)" in capsys.readouterr().out


def test_an_existing_run_is_not_overwritten(run_folder, graph_folder, capsys):
    assert train("--data", graph_folder, "--run-dir", run_folder, *QUICK) == 1
    assert f"continue it with --resume {run_folder}" in capsys.readouterr().err


def test_resume_takes_its_own_settings(run_folder, capsys):
    assert train("--resume", run_folder, "--beta", 0.5) == 1
    assert "--beta cannot be given" in capsys.readouterr().err


def test_resume_to_more_steps_without_the_data(run_folder, graph_folder, capsys):
    for file in graph_folder.iterdir():
        file.unlink()
    assert train("--resume", run_folder, "--steps", 60) == 0
    assert "Hits@10" in capsys.readouterr().out
    assert RunFolder.open(run_folder).read_config().steps == 60
    steps = [m["step"] for m in RunFolder.open(run_folder).read_metrics() if "loss" in m]
    assert steps == [10, 20, 30, 40, 50, 60]


def test_resume_with_a_preset(run_folder, capsys):
    assert train("--resume", run_folder, "--preset", "hake-wn18rr") == 1
    assert "--preset cannot be given" in capsys.readouterr().err


def test_a_graph_that_cannot_be_right_is_told(graph_folder, tmp_path, capsys):
    (graph_folder / "test.txt").write_text((graph_folder / "valid.txt").read_text() * 2)
    (graph_folder / "train.txt").open("a").write("e1 \tr1\te2\n")
    assert train("--data", graph_folder, "--run-dir", tmp_path / "run", *QUICK) == 0
    err = capsys.readouterr().err
    assert "emu-train: warning: one of the entities with blanks at an end of the name: 'e1 '" in err
    assert "emu-train: warning: 100 of the test triples repeat another one" in err


def test_a_setting_that_nothing_reads_is_told(graph_folder, tmp_path, capsys):
    given = ("--loss", "softmax", "--mutation-rate", 0.3, "--steps", 10, "--negatives", 4)
    assert train("--data", graph_folder, "--run-dir", tmp_path / "run", *QUICK, *given) == 0
    err = capsys.readouterr().err
    assert "emu-train: warning: loss softmax does not use --mutation-rate" in err
    assert err.count("does not use") == 1


def test_a_setting_that_only_the_model_reads_is_not_told(graph_folder, tmp_path, capsys):
    given = ("--model", "TransE", "--margin", 3, "--steps", 10)
    assert train("--data", graph_folder, "--run-dir", tmp_path / "run", *QUICK, *given) == 0
    assert "does not use" not in capsys.readouterr().err


def test_a_loss_over_all_entities_samples_nothing(graph_folder, tmp_path, capsys):
    given = ("--loss", "onevsall", "--rows-per-set", 8, "--steps", 10)
    assert train("--data", graph_folder, "--run-dir", tmp_path / "run", *QUICK, *given) == 0
    err = capsys.readouterr().err
    assert "loss onevsall does not use --rows-per-set" in err
    assert "loss onevsall does not use --negatives" in err


def test_nothing_is_held_out_of_three_files(graph_folder, tmp_path, capsys):
    given = ("--hold-out", 0.2, "--steps", 10)
    assert train("--data", graph_folder, "--run-dir", tmp_path / "run", *QUICK, *given) == 0
    assert "a graph in several files does not use --hold-out" in capsys.readouterr().err


def test_steps_after_a_cosine_are_told(graph_folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--data", graph_folder, "--run-dir", run, *QUICK, "--schedule=cosine") == 0
    assert train("--resume", run) == 0
    assert "cosine" not in capsys.readouterr().err
    assert train("--resume", run, "--steps=50") == 0
    assert "the cosine ends at step 40, after which the learning rate is 0" in (
        capsys.readouterr().err
    )


def test_names_in_any_case(graph_folder, tmp_path):
    folder = tmp_path / "run"
    given = ("--model", "COMPLEX", "--loss", "EMU", "--optimizer", "adam")
    assert train("--data", graph_folder, "--run-dir", folder, *QUICK, *given) == 0
    config = RunFolder.open(folder).read_config()
    assert (config.model, config.loss, config.optimizer) == ("ComplEx", "emu", "Adam")


def test_an_estimate_after_a_hundred_steps(graph_folder, tmp_path, monkeypatch, capsys):
    """For steps of 3 s, with log lines and validations in between."""
    seconds, step = [0.0], Trainer._train_step

    def slow(trainer: Trainer) -> None:
        seconds[0] += 3
        step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    given = ("--steps", 120)
    assert train("--data", graph_folder, "--run-dir", tmp_path / "run", *QUICK, *given) == 0
    told = "100 steps took 300 s: about 60 s for the other 20, without validation"
    assert told in capsys.readouterr().err.splitlines()
    said = [duration(seconds) for seconds in (0.04, 99, 150, 5970, 36_000)]
    assert said == ["0.04 s", "99 s", "2 min", "100 min", "10.0 h"]


def test_a_preset_and_what_overrides_it(graph_folder, tmp_path, capsys):
    """Options override its dataset too; another loss brings its own default regularization."""
    path = tmp_path / "run"
    options = ["--preset", "rotate-fb15k-237", "--loss", "softmax", "--data", graph_folder]
    assert train(*options, "--run-dir", path, *QUICK) == 0
    assert (
        "RotatE, d = 8, sampled softmax, negatives from all entities; Adagrad, lr 0.05, L3 0.001"
        in " ".join(capsys.readouterr().out.split())
    )
    config = RunFolder.open(path).read_config()
    assert (config.model, config.lr, config.negatives, config.dataset) == ("RotatE", 0.05, 8, None)


def test_a_preset_alone_names_its_dataset(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EMU_KERNELS_DATA", str(data_folder))
    path = tmp_path / "run"
    preset = ["--preset", "transe-wn18rr", "--run-dir", path]
    assert train(*preset, *QUICK, "--steps=1", "--eval-every=9", "--dataset", "nations") == 0
    assert "TransE, 1-norm, d = 8, EMU" in capsys.readouterr().out
    config = RunFolder.open(path).read_config()
    assert (config.model, config.dataset) == ("TransE", "nations")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loss=mixup", "--mixup-order=3"], "(mixup order 3, beta 0.53, alpha 0.11)"),
        (["--loss=expected"], "without masks (mutation rate 0.61, beta 0.53, alpha 0.11)"),
        (["--negatives=all"], "EMU (mutation rate 0.61, mask unit component, beta 0.53,"),
        (["--mask-unit=pair"], "EMU (mutation rate 0.6094, mask unit pair, beta 0.53, alpha"),
        (
            ["--loss=selfadv", "--margin=9", "--adversarial-temperature=0.5", "--subsampling"],
            "(margin 9, adversarial temperature 0.5), negatives from all entities, subsampling",
        ),
        (["--sampler=structure-aware", "--walks=9"], "neighbourhood, SAN (hops 3, walks 9);"),
        (["--model=PairRE", "--norm=2"], "PairRE, 2-norm, d = 8,"),
        (["--model=HAKE"], "Adagrad, lr 0.05,"),
        (["--model=HAKE", "--lr=0.3"], "Adagrad, lr 0.3,"),
        (["--inverse-relations"], "DistMult, d = 8, inverse relations, EMU"),
    ],
)
def test_settings_are_printed(graph_folder, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / name)
    folder = ["--data", graph_folder, "--run-dir", tmp_path / "run"]
    assert train(*folder, *QUICK, "--steps=2", *options) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_while_the_test_split_is_ranked(graph_folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish", interrupt)
        assert train("--data", graph_folder, "--run-dir", run, *QUICK) == cli.INTERRUPTED
    assert f"saved at step 40; go on with: emu-train --resume {run}" in capsys.readouterr().out
    assert train("--resume", run) == 0
    assert "Hits@10" in capsys.readouterr().out
    monkeypatch.setattr(cli, "load_graph", interrupt)
    assert train("--data", graph_folder, *QUICK) == cli.INTERRUPTED
    assert capsys.readouterr().err == "emu-train: stopped\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_saves_and_says_how_to_go_on(graph_folder, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "emu_kernels.trainer.cli", "--data", str(graph_folder)]
    command += ["--run-dir", str(run), *QUICK, "--steps", "1000000"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr is not None
        assert "step 20" in process.stderr.readline()  # the first evaluation
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert f"go on with: emu-train --resume {run}" in out
    assert "Traceback" not in err
    config = RunFolder.open(run)
    assert config.last_file.exists()
    assert json.loads(config.config_file.read_text())["config"]["steps"] == 1_000_000


def test_predict_prints_names_scores_and_what_is_known(run_folder, named_triples, capsys):
    capsys.readouterr()
    head, relation, tail = named_triples["train"][0]
    assert predict.main([str(run_folder), "--head", head, "--relation", relation]) == 0
    out = capsys.readouterr().out
    assert f"({head}, {relation}, ?)" in out
    rows = [line.split() for line in out.splitlines()[3:]]
    assert len(rows) == 10
    scores = [float(row[2]) for row in rows]
    assert scores == sorted(scores, reverse=True)

    known: dict[str, str] = {}
    for split in ("train", "valid", "test"):
        for h, r, t in named_triples[split]:
            if (h, r) == (head, relation):
                known.setdefault(t, split)
    assert tail in known
    everything = ["--top", "48", "--relation", relation]
    assert predict.main([str(run_folder), "--head", head, *everything]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert {row[1]: row[3] for row in rows if len(row) == 4} == known


def test_predict_into_a_closed_pipe(run_folder, named_triples):
    """As in `emu-predict ... | head -1`."""
    head, relation, _ = named_triples["train"][0]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "emu_kernels.trainer.predict", run_folder, "--head", head]
    done = subprocess.run(
        [*command, "--relation", relation], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--head", "e1000", "--relation", "r1"], "holds no entity 'e1000'; did you mean e"),
        (["--tail", "e1", "--relation", "quux"], "holds no relation 'quux'"),
    ],
)
def test_predict_unknown_names(run_folder, capsys, arguments, said):
    assert predict.main([str(run_folder), *arguments]) == 1
    assert said in capsys.readouterr().err


def test_predict_without_a_run(tmp_path, capsys):
    assert predict.main([str(tmp_path), "--head", "a", "--relation", "b"]) == 1
    assert "is not a run folder" in capsys.readouterr().err
