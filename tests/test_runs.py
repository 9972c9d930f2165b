"""runs.py: what the trainer writes, run folders as a table, and damaged ones."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_laws import loss, refused, said

import laws
import plan
import runs


def make_run(folder, lineage, losses, flops=1e15, tokens=1e8, seed=1, corpus="python", config=None, plan=(), **counts):
    """A run folder by hand: `lineage` before this run, then a training of `tokens` with one evaluation a loss."""
    folder.mkdir(parents=True)
    data = {corpus: {"weight": 0.9, "tokens": tokens * 0.9}, "other": {"weight": 0.1, "tokens": tokens * 0.1}}
    settings = {"lr": 0.003, "out": str(folder), **dict(plan)}
    train = {"step": "train", "tokens": tokens, "flops": flops, "seed": seed, "data": data, "settings": settings}
    about = {"N": 100, "N_active": 100, "N_total": 100, "embeddings": 10, "lineage": [*lineage, train]} | counts
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    with open(folder / "eval.csv", "w") as file:
        file.write(f"step,tokens,flops,seconds,{corpus}_loss,{corpus}_bits_per_byte,other_loss,other_bits_per_byte\n")
        for i, value in enumerate(losses):
            done = i / (len(losses) - 1)
            file.write(f"{100 * i},{tokens * done},{flops * done},{i},{value},{value / 2},9.0,4.5\n")
    return train


MOE = {"num_local_experts": 32, "num_experts_per_tok": 8, "granularity": 4}


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))


def test_table_counts_the_whole_lineage(tmp_path, capsys):
    dense = make_run(tmp_path / "dense", [], [5, 4, 3], flops=1e15, tokens=2e8)
    upcycled = [dense, {"step": "upcycle", "experts": 8, "top_k": 2}]
    make_run(tmp_path / "moe", upcycled, [3, 2.5], flops=5e14, config=MOE, N_total=400)
    runs.main(["table", str(tmp_path / "dense"), str(tmp_path / "moe")])
    a, b = rows_of(capsys.readouterr().out)
    assert [a[k] for k in ("L", "D1", "D2", "G", "E")] == ["3.0", "", "", "", ""] and float(a["D"]) == 2e8
    assert [float(b[k]) for k in "L D D1 D2 E K G flops flops_total seed".split()] == [
        2.5,
        3e8,
        2e8,
        1e8,
        8,
        2,
        4,
        5e14,
        1.5e15,
        1,
    ]


def test_table_leaves_unknown_empty(tmp_path, capsys):
    source = [{"step": "source", "name": "llama", "tokens": None}, {"step": "upcycle", "experts": 8, "top_k": 2}]
    make_run(tmp_path / "a", source, [3, 2])
    make_run(tmp_path / "b", [source[0] | {"tokens": 2e12}, source[1]], [3, 2])
    runs.main(["table", str(tmp_path)])
    a, b = rows_of(capsys.readouterr().out)
    assert [a[k] for k in ("D", "D1", "D2", "flops_total")] == ["", "", "100000000.0", ""]
    assert [float(b[k]) for k in ("D", "D1", "D2")] == [2.0001e12, 2e12, 1e8] and b["flops_total"] == ""


def test_table_finds_snapshots_and_branches_below_a_run_once(tmp_path, capsys):
    trunk = make_run(tmp_path / "run", [], [5, 4, 3, 2])
    make_run(tmp_path / "run/branch", [trunk | {"tokens": 5e7, "flops": 5e14}], [4, 2.8])
    snapshot = tmp_path / "run/step-200"  # a whole folder, its logs cut at its step
    make_run(snapshot, [], [5, 4, 3], tokens=2 / 3 * 1e8, flops=2 / 3 * 1e15)
    runs.main(["table", str(tmp_path), str(snapshot)])
    found = {Path(r["run"]).name: r for r in rows_of(capsys.readouterr().out)}
    assert sorted(found) == ["branch", "run", "step-200"]
    assert float(found["step-200"]["L"]) == 3 and float(found["step-200"]["D"]) == pytest.approx(2 / 3 * 1e8)
    assert float(found["branch"]["D"]) == 1.5e8 and float(found["branch"]["flops_total"]) == 1.5e15


def test_table_puts_seeds_together_but_not_other_settings(tmp_path, capsys):
    for seed, last in ((1, 3.0), (2, 3.2), (3, 3.1)):
        make_run(tmp_path / f"s{seed}", [], [5, last], seed=seed)
    make_run(tmp_path / "longer", [], [5, 2.9], tokens=2e8)
    runs.main(["table", str(tmp_path), "--seeds"])
    one, three = sorted(rows_of(capsys.readouterr().out), key=lambda r: int(r["runs"]))
    assert (
        float(three["L"]) == pytest.approx(3.1) and float(three["L_sd"]) == pytest.approx(0.1) and three["runs"] == "3"
    )
    assert one["runs"] == "1" and one["L_sd"] == ""


def test_the_same_seed_twice_is_no_second_seed(tmp_path, capsys):
    make_run(tmp_path / "a", [], [5, 3.0])
    make_run(tmp_path / "b", [], [5, 3.1])
    for command in ("table", "compare"):
        line = refused(capsys, command, tmp_path / "a", tmp_path / "b", "--seeds")
        assert f"{tmp_path}/a and {tmp_path}/b have the same seed 1" in line
    for seed in (1, 2):  # children of two seeds, with a seed of their own that is the same
        make_run(tmp_path / f"child{seed}", [{"step": "train", "tokens": 1, "flops": 1, "seed": seed}], [3, 2 + seed])
    answer = said(capsys, "table", tmp_path / "child1", tmp_path / "child2", "--seeds", "--json")
    assert answer["runs"][0]["runs"] == 2
    for seed in (1, 2):  # a seed that nothing was drawn with
        make_run(tmp_path / f"twin{seed}", [], [3, 2], seed=seed)
    line = refused(capsys, "table", tmp_path / "twin1", tmp_path / "twin2", "--seeds")
    assert "twin1 and" in line and "have the same losses (their seeds changed nothing" in line


def test_seeds_are_put_together_whatever_their_order_of_corpora_and_their_rhythm(tmp_path, capsys):
    for seed in (1, 2):
        make_run(tmp_path / f"s{seed}", [], [5, 3 + seed], seed=seed, plan={"save_every": seed, "eval_tokens": 9})
        about = json.loads((tmp_path / f"s{seed}/run.json").read_text())
        about["lineage"][-1]["data"]["python"]["tokens"] -= seed
        (tmp_path / f"s{seed}/run.json").write_text(json.dumps(about))
    [both] = said(capsys, "table", tmp_path, "--seeds", "--json")["runs"]
    assert both["runs"] == 2 and both["L"] == 4.5


def test_a_snapshot_of_the_last_step_is_the_run_again(tmp_path, capsys):
    plan = {"schedule": "constant", "optimizer": "muon"}
    make_run(tmp_path / "trunk", [], [5, 4, 3], tokens=9e6, plan=plan)
    shutil.copytree(tmp_path / "trunk", tmp_path / "other")
    make_run(tmp_path / "trunk/step-4", [], [5, 4], tokens=4e6, plan=plan)
    shutil.move(tmp_path / "other", tmp_path / "trunk/step-9")
    rows = said(capsys, "table", tmp_path, "--json")["runs"]
    assert sorted(Path(row["run"]).name for row in rows) == ["step-4", "trunk"]
    assert {(row["optimizer"], row["schedule"]) for row in rows} == {("muon", "constant")}
    [alone] = said(capsys, "table", tmp_path / "trunk/step-9", "--json")["runs"]
    assert alone["D"] == 9e6


def test_table_smooths_and_picks_the_corpus_as_asked(tmp_path, capsys):
    make_run(tmp_path / "run", [], [5, 4, 3, 2])
    for flags, L in (([], 2), (["--smooth", "2"], 2.5), (["--corpus", "other"], 9)):
        runs.main(["table", str(tmp_path), *flags])
        printed = capsys.readouterr()
        assert float(rows_of(printed.out)[0]["L"]) == L and ("other" if L == 9 else "python") in printed.err


def test_compare_charges_the_ancestors(tmp_path, capsys):
    make_run(tmp_path / "scratch", [], [5, 4, 3], flops=2e15)
    base = make_run(tmp_path / "base", [], [5, 4.5], flops=1e14)
    make_run(tmp_path / "stacked", [base, {"step": "grow", "axis": "depth", "factor": 4}], [4.6, 3], flops=9e14)
    answer = said(capsys, "compare", tmp_path / "scratch", tmp_path / "stacked", "--json")
    assert answer["target_loss"] == 3 and answer["speedup"] == pytest.approx(2e15 / (9e14 + 1e14) - 1)
    halfway = said(capsys, "compare", tmp_path / "scratch", tmp_path / "stacked", "--target", "4", "--json")
    assert halfway["flops_baseline"] == pytest.approx(1e15)


def test_compare_of_a_run_with_its_ancestor_says_that_it_is_no_speedup(tmp_path, capsys):
    base = make_run(tmp_path / "base", [], [5, 4], flops=1e15)
    make_run(tmp_path / "child", [base], [4, 3], flops=1e15)
    make_run(tmp_path / "scratch", [], [5, 4, 3], flops=3e15)
    for pair in (("base", "child"), ("child", "base")):
        folders = [str(tmp_path / name) for name in pair]
        runs.main(["compare", *folders])
        assert "one goes on from the other" in capsys.readouterr().out
        assert said(capsys, "compare", *folders, "--json")["ancestor"] is True
    runs.main(["compare", str(tmp_path / "scratch"), str(tmp_path / "child")])
    assert "one goes on" not in capsys.readouterr().out


def test_table_feeds_fit_feeds_predict(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(12):
        N, D = float(10 ** rng.uniform(6, 8)), float(10 ** rng.uniform(7, 9))
        make_run(tmp_path / f"out/{i}", [], [8, loss("chinchilla", N=N, D=D)], tokens=D, N=N)
    runs.main(["table", str(tmp_path / "out")])
    (tmp_path / "runs.csv").write_text(capsys.readouterr().out)
    report = said(capsys, "fit", "chinchilla", tmp_path / "runs.csv", "--bootstrap", "20", "--json")
    (tmp_path / "fit.json").write_text(json.dumps(report))
    answer = said(capsys, "predict", "chinchilla", "--N", "1e7", "--D", "1e8", "--fit", tmp_path / "fit.json", "--json")
    assert answer["L"] == pytest.approx(loss("chinchilla", N=1e7, D=1e8), rel=1e-3) and len(answer["interval"]) == 2
    best = said(capsys, "optimal", "chinchilla", "--flops", "1e17", "--fit", tmp_path / "fit.json", "--json")
    assert best["N"] == pytest.approx(plan.optimal(laws.published("chinchilla"), 1e17)["N"], rel=0.01)
    assert best["intervals"]["N"] == pytest.approx([best["N"]] * 2, rel=0.01)  # exact data leave no doubt


@pytest.mark.parametrize("damage", ["run.json", "eval.csv", "text", "corpus", "flops"])
def test_bad_run_folders_are_refused(tmp_path, capsys, damage):
    make_run(tmp_path / "a", [], [5, 3])
    make_run(tmp_path / "b", [{"step": "source", "name": "x", "tokens": 1}], [5, 3])
    if damage in ("run.json", "eval.csv"):
        (tmp_path / "b" / damage).write_text("{")
    elif damage == "text":
        (tmp_path / "b" / "eval.csv").write_text("step,tokens,flops,python_loss\n0,0,0,much\n")
    flags = ["--corpus", "latin"] if damage == "corpus" else []
    line = refused(capsys, "compare", tmp_path / "a", tmp_path / "b", *flags)
    says = {
        "run.json": "damaged",
        "eval.csv": "no column",
        "text": "row 1",
        "corpus": "a has no losses on latin (--corpus python, other)",
        "flops": "unknown FLOPs",
    }
    assert says[damage] in line


GOOD = {"N": 1, "lineage": [{"step": "train", "tokens": 10, "flops": 10, "data": {"python": {"weight": 1.0}}}]}

LAST = GOOD["lineage"][0]

EVALS = "step,tokens,flops,python_loss\n0,0,0,5\n"


@pytest.mark.parametrize(
    "file, text",
    [
        ("run.json", ""),
        ("run.json", "[]"),
        ("run.json", "{}"),
        ("run.json", '{"lineage": []}'),
        ("run.json", json.dumps({"lineage": [LAST | {"data": 3}]})),
        ("run.json", json.dumps({"lineage": [LAST | {"data": {"python": {"weight": "x"}}}]})),
        ("run.json", json.dumps({"lineage": [LAST | {"tokens": "x"}, LAST]})),
        ("run.json", json.dumps({"lineage": [LAST | {"flops": -1}, LAST]})),
        ("run.json", json.dumps({"lineage": [LAST | {"step": "upcycle"}]})),
        ("run.json", json.dumps(GOOD | {"N": [1]})),
        ("run.json", json.dumps(GOOD | {"N": math.nan})),
        ("run.json", "[" * 100_000),
        ("config.json", "[1]"),
        ("config.json", '{"num_experts": 8}'),
        ("config.json", '{"num_experts": 8, "num_experts_per_tok": 2, "granularity": 0}'),
        ("eval.csv", ""),
        ("eval.csv", EVALS.splitlines()[0]),
        ("eval.csv", EVALS + "1,10,1"),
        ("eval.csv", EVALS + "1,10,10,nan\n"),
        ("eval.csv", EVALS + "1,-10,10,3\n"),
        ("eval.csv", EVALS + "1,10,10,3,7\n"),
        ("eval.csv", "step,tokens,flops\n1,2,3\n"),
        ("eval.csv", "\0"),
    ],
)
def test_a_damaged_run_is_refused_by_table_and_compare(tmp_path, capsys, file, text):
    make_run(tmp_path / "a", [], [5, 3])
    folder = tmp_path / "b"
    folder.mkdir()
    for name, right in (("run.json", json.dumps(GOOD)), ("config.json", "{}"), ("eval.csv", EVALS + "1,10,10,3\n")):
        (folder / name).write_text(right)
    assert said(capsys, "compare", tmp_path / "a", folder, "--json")["target_loss"] == 3
    (folder / file).write_text(text)
    for arguments in (["table", folder], ["compare", tmp_path / "a", folder, "--seeds", "--json"]):
        assert f"{folder} is damaged" in refused(capsys, *arguments)


def test_losses_on_different_texts_are_not_compared(tmp_path, capsys):
    make_run(tmp_path / "a", [], [5, 3])
    make_run(tmp_path / "b", [], [5, 3], corpus="cpp")
    assert "choose one with --corpus" in refused(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert said(capsys, "compare", tmp_path / "a", tmp_path / "b", "--corpus", "other", "--json")["target_loss"] == 9
    runs.main(["table", str(tmp_path)])
    assert "do not compare" in capsys.readouterr().err
    (tmp_path / "runs.csv").write_text("N,D,L,corpus\n1,2,3,python\n2,2,3,cpp\n")
    line = refused(capsys, "fit", "chinchilla", tmp_path / "runs.csv")
    assert "row 1 has corpus python, row 2 has corpus cpp (one law, one kind of run: choose" in line
    for column, a, b in (("optimizer", "muon", "adamw"), ("schedule", "wsd", "constant"), ("D1", "", 9), ("G", 1, 8)):
        (tmp_path / "runs.csv").write_text(f"N,D,L,{column}\n1,2,3,{a}\n2,2,3,{b}\n")
        assert f"row 1 has {column} " in refused(capsys, "fit", "chinchilla", tmp_path / "runs.csv")


def test_one_name_for_two_texts_or_two_tokenizers_is_noticed(tmp_path, capsys):
    for i, text in enumerate(("same", "same", "other")):
        make_run(tmp_path / str(i), [], [5, 3], plan={"tokenizer": "gpt2" if i == 1 else "bytes"})
        about = json.loads((tmp_path / str(i) / "run.json").read_text())
        about["lineage"][-1]["data"]["python"]["sha256"] = text
        (tmp_path / str(i) / "run.json").write_text(json.dumps(about))
    for other in "12":
        assert "another text called python" in refused(capsys, "compare", tmp_path / "0", tmp_path / other)


def test_a_folder_that_no_training_has_touched_is_skipped_and_named(tmp_path, capsys):
    make_run(tmp_path / "run", [], [5, 3])
    make_run(tmp_path / "upcycled", [], [5, 3])
    (tmp_path / "upcycled/eval.csv").unlink()
    answer = said(capsys, "table", tmp_path, "--json")
    assert len(answer["runs"]) == 1 and answer["skipped"] == [f"{tmp_path}/upcycled has no eval.csv"]
    killed = tmp_path / "killed"
    killed.mkdir()
    for folder in (killed, killed / "step-3.partial"):
        folder.mkdir(exist_ok=True)
        (folder / "log.csv").write_text("step,tokens\n")
    skipped = said(capsys, "table", tmp_path, "--json")["skipped"]
    assert sorted(skipped)[0] == f"{killed} has no run.json: it was not saved yet" and len(skipped) == 2
    assert "it was not saved yet" in refused(capsys, "table", killed)
    for missing in (tmp_path / "upcycled", tmp_path / "nothing"):
        assert refused(capsys, "compare", tmp_path / "run", missing)
    line = refused(capsys, "table", tmp_path / "upcycled")
    assert "no finished run below" in line and "upcycled has no eval.csv" in line


@pytest.mark.parametrize("horizon", [{"tokens": 9.3e6}, {"flops": 9.3e15}, {"tokens_per_param": 9.3e4}])
def test_an_interrupted_run_is_left_out_of_the_table_and_named(tmp_path, capsys, horizon):
    """Steps of 1e6 tokens and a horizon of 9.3e6: nine steps."""
    plan = {"tokens": None, "flops": None, "tokens_per_param": None, "batch_tokens": 10**6} | horizon
    make_run(tmp_path / "whole", [], [5, 3], tokens=9e6, flops=9e15, plan=plan | {"schedule": "wsd"})
    make_run(tmp_path / "whole/step-8", [], [5, 4], tokens=8e6, flops=8e15, plan=plan | {"schedule": "wsd"})
    make_run(tmp_path / "begun", [], [5, 5], tokens=0, flops=0, plan=plan | {"schedule": "cosine"})
    make_run(tmp_path / "flat", [], [5, 4], tokens=8e6, flops=8e15, plan=plan | {"schedule": "constant"})
    make_run(tmp_path / "still", [], [5, 5], tokens=0, flops=0, plan=plan | {"schedule": "constant"})
    runs.main(["table", str(tmp_path)])
    printed = capsys.readouterr()
    assert {Path(r["run"]).name for r in rows_of(printed.out)} == {"whole", "flat"}
    for left_out in ("begun is left out: 0 %", "still is left out: 0 %", "step-8 is left out: 86 %"):
        assert left_out in printed.err
    assert "begun is left out" in refused(capsys, "table", tmp_path / "begun")


def test_fit_refuses_a_table_of_dense_models_and_mixtures(tmp_path, capsys):
    for i, config in enumerate([None] * 3 + [MOE] * 2):
        make_run(tmp_path / f"out/{i}", [], [5, 4 - i / 10], tokens=(i + 1) * 1e8, config=config)
    runs.main(["table", str(tmp_path / "out")])
    (tmp_path / "runs.csv").write_text(capsys.readouterr().out)
    line = refused(capsys, "fit", "chinchilla", tmp_path / "runs.csv")
    assert "row 1 (" in line and "out/0) has E none, row 4" in line and "out/3) has E 8 " in line


# -------------------------------------------------------------------------------------------- what the trainer writes


def test_a_table_is_cut_back_to_the_step_of_a_resume(tmp_path):
    runs.open_table(tmp_path / "log.csv", ["step", "loss"], -1)
    for step in (10, 20, 30):
        runs.add_row(tmp_path / "log.csv", ["step", "loss"], {"step": step, "loss": 3, "unused": 1})
    runs.open_table(tmp_path / "log.csv", ["step", "loss"], 20)
    assert [row["step"] for row in rows_of((tmp_path / "log.csv").read_text())] == ["10", "20"]


@pytest.mark.parametrize("load", [None, torch.tensor([[4.0, 0.0, 2.0, 2.0]])])
def test_the_end_of_a_run_is_told_on_one_screen(tmp_path, capsys, load):
    """Also in a folder whose name is half a formula."""
    out = tmp_path / r"o_$\x$"
    make_run(out, [], [5, 3])
    (out / "log.csv").write_text("tokens,loss\n32,5.4\n256,4.4\n")
    runs.summarise(out, {"python": [4, 3.5, 2.5], "other": [3, 3, 3]}, {"python": 3.0, "other": 9.0},
                   {"python": 1.5, "other": 4.5}, load, "def f():")  # fmt: skip
    shown = capsys.readouterr().out
    assert "below 2-gram counts" in shown and "above all of them" in shown and "def f():" in shown
    assert ("layer  0  9.55" in shown) == (load is not None) and ("--upcycle" in shown) == (load is None)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
