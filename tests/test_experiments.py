"""The papers' experiments: who trains what, what a table says, and one of them from text to figure."""

import csv
import importlib
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import ladder
import papers
import verdict
from papers import climb, divide, grown, needed, next_rate, spent

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
PLANS = ("dense", "granularity", "upcycling", "recipes", "stacking", "continual", "optimizers")


def listed(name, seeds=(1, 2, 3)):
    return {run.name: run for run in importlib.import_module(name).plan([*seeds])}


# ---- who trains what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_a_run_comes_after_what_it_starts_from_and_in_the_same_share(name):
    plan, before = listed(name), set()
    for n in (1, 2, 3):
        owner = divide(plan, n)
        assert {*owner.values()} == {*range(1, n + 1)}
        for run in plan.values():
            assert not run.parent or owner[plan[run.parent[1]].trunk] == owner[run.trunk]
    for run in plan.values():
        assert not run.parent or run.parent[1] in before
        before.add(run.name)


@pytest.mark.parametrize("name", PLANS)
def test_runs_of_one_name_are_the_same_run_and_a_name_is_a_folder(name):
    runs, plan = importlib.import_module(name).plan([1, 2]), listed(name, [1, 2])
    assert all(run == plan[run.name] for run in runs)
    assert all(Path(run.name).name == run.name and not {*" ,:"} & {*run.name} for run in runs)


@pytest.mark.parametrize("name", PLANS)
def test_all_sizes_come_at_the_first_seed_before_any_at_the_second(name):
    seeds = [run.name.split("_muon_")[1][0] for run in listed(name).values() if "_muon_" in run.name]
    assert seeds == sorted(seeds)


@pytest.mark.parametrize("name", PLANS)
def test_the_first_run_of_a_sweep_is_that_of_the_first_seed(name):
    """So no share waits for a rate of a run that comes later."""
    plan = listed(name)
    for rate in {run.rate for run in plan.values()} - {""}:
        first = next(run for run in plan.values() if run.rate == rate)
        assert first.flags[first.flags.index("--seed") + 1] == 1


@pytest.mark.parametrize("name", PLANS)
def test_two_shares_take_about_the_same_time(name):
    plan = listed(name)
    owner, load = divide(plan, 2), [0.0, 0.0]
    for run in [*plan.values(), *papers.sweeps(plan)]:
        load[owner[run.trunk] - 1] += papers.seconds(run)
    assert max(load) < 1.2 * min(load)


def test_what_the_table_lacks_is_needed_with_all_its_ancestors_and_nothing_else():
    base = climb("base", "64x2", [], 1, also=[2048])
    made = grown("grow.py", (base[0], 2048), "64x4", "--factor", 2)
    runs = [*base, made, *climb("on", "64x4", [4096, 8192], 1, parent=(made, None)), *climb("other", "64x2", [4096], 1)]
    plan = {run.name: run for run in runs}
    rows = {run.name for run in runs if run.columns}
    assert needed(plan, rows) == set()
    assert needed(plan, rows - {"on_64x4_muon_1-to-4096"}) == {
        "on_64x4_muon_1-to-4096", "on_64x4_muon_1", made.name, base[0].name}  # fmt: skip


def test_spent_counts_each_shape_of_the_lineage():
    base = climb("base", "64x2", [], 1, also=[2048, 6144])
    made = grown("ligo.py", (base[0], 2048), "64x4", tokens=1024)
    runs = [*base, made, *climb("on", "64x4", [8192, 16384], 1, parent=(made, None))]
    plan = {run.name: run for run in runs}
    assert spent(runs[-2], plan) == "64x2:2048+64x4:1024+64x4:6144+64x4:2048"
    assert spent(runs[-1], plan) == "64x2:2048+64x4:1024+64x4:12288+64x4:4096"


def test_one_budget_is_one_run_and_several_are_a_trunk_with_branches():
    (one,) = climb("a", "64x2", [8192], 1)
    assert one.columns["budget"] == one.tokens == 8192 and not one.schedule
    trunk, *branches = climb("a", "64x2", [8192, 16384], 1)
    assert trunk.schedule == ("--schedule", "constant", "--save-at", "6144,12288") and trunk.columns is None
    assert [run.parent for run in branches] == [("--branch", trunk.name, "step-3"), ("--branch", trunk.name, "step-6")]


@pytest.mark.parametrize("lowest", [0.0015, 0.003, 0.006, 0.012, 0.024, 0.048])
def test_a_sweep_walks_until_the_lowest_loss_has_a_neighbour_on_each_side(lowest):
    points = []
    while (lr := next_rate(points, 0.012)) is not None:
        points.append((lr, math.log(lr / lowest) ** 2))
    rates = sorted(lr for lr, _ in points)
    assert min(points, key=lambda p: p[1])[0] == pytest.approx(lowest)
    assert rates[0] < lowest * 0.6 and rates[-1] > lowest * 1.7 and len(rates) <= papers.RATES


def test_a_sweep_ends_also_where_every_rate_is_better_than_the_last():
    points = []
    while (lr := next_rate(points, 0.012)) is not None:
        points.append((lr, -lr))
    assert len(points) == papers.RATES


def test_shapes_become_flags():
    assert papers.model_flags("64x3") == ["--hidden-size", "64", "--num-hidden-layers", "3"]
    assert papers.model_flags("64x3 8x2 G4")[4:] == ["--experts", "8", "--top-k", "2", "--granularity", "4"]


# ---- what a table says ----------------------------------------------------------------------------------------------


def test_a_ladder_is_read_between_its_budgets_and_not_outside():
    points = [(1, 3.0, 1e10), (2, 2.0, 1e12)]
    assert ladder.at(points, 1e11) == pytest.approx(2.5) and ladder.reach(points, 2.5) == pytest.approx(1e11)
    assert math.isnan(ladder.at(points, 1e13)) and math.isnan(ladder.reach(points, 1.9))
    assert ladder.cell([1.0, 1.2]) == "+1.100 ± 0.141" and ladder.cell([1.0, math.nan]) == "outside"


def test_a_verdict_knows_noise():
    mean, low, high = verdict.interval([1.0, 2.0, 3.0])
    assert (mean, high - mean, mean - low) == pytest.approx((2, 2.484, 2.484), abs=1e-3)  # 4.303 / sqrt(3)
    assert "0 lies inside" in verdict.verdict([-1.0, 0.1, 1.0])
    assert "0 lies inside" not in verdict.verdict([1.0, 1.1, 1.2])
    assert verdict.verdict([math.nan, 1.0]) == "outside"


def test_differences_are_paired_by_seed_and_read_off_at_equal_flops():
    rows = [dict(arm="new", budget=2, seed=s, L=1.5 + s, flops_total=10.0, D=1) for s in (1, 2)]
    rows += [dict(arm="old", budget=b, seed=s, L=s + l, flops_total=f, D=b) for s in (1, 2, 3)
             for b, l, f in ((1, 2.0, 1.0), (2, 1.0, 100.0))]  # fmt: skip
    assert verdict.less(rows, dict(arm="new"), dict(arm="old"), "flops_total") == pytest.approx([0, 0])


def test_what_two_processes_append_to_a_table_keeps_one_header(tmp_path):
    code = """import sys, ladder, pathlib
for i in range(50):
    ladder.append(pathlib.Path("t.csv"), {"who": sys.argv[1], "i": i})"""
    env = os.environ | {"PYTHONPATH": str(EXPERIMENTS)}
    each = [subprocess.Popen([sys.executable, "-c", code, who], cwd=tmp_path, env=env) for who in "ab"]
    assert [p.wait() for p in each] == [0, 0]
    rows = list(csv.DictReader(open(tmp_path / "t.csv")))
    assert sorted((r["who"], int(r["i"])) for r in rows) == [(who, i) for who in "ab" for i in range(50)]


def counts(shape):
    """(N, N_active, N_total, E, K, G) of a shape, as model.py counts them."""
    size, *mixture = shape.split()
    d, layers = map(int, size.split("x"))
    N, mlp = 13 * d * d * layers, 9 * d * d * layers
    if not mixture:
        return N, N, N, "", "", ""
    (E, K), G = map(int, mixture[0].split("x")), int(mixture[1][1:]) if mixture[1:] else 1
    router = d * E * G * layers
    return N, N + (K - 1) * mlp + router, N + (E - 1) * mlp + router, E, K, G


def invent(name, home, law, noise=0.001):
    """runs.csv and seconds.csv of an experiment whose every loss is law(row), but for a little noise."""
    plan, chance = listed(name), random.Random(1)
    for run in plan.values():
        if not run.columns:
            continue
        N, active, total, E, K, G = counts(run.shape)
        parts = [(shape, int(tokens)) for shape, tokens in (p.rsplit(":", 1) for p in spent(run, plan).split("+"))]
        flops = sum(6 * (counts(shape)[1] + 256 * int(shape.split("x")[0])) * tokens for shape, tokens in parts)
        arm, D, D2 = run.columns["arm"], sum(tokens for _, tokens in parts), papers.whole(run.columns["budget"])
        grew = D > D2 and name != "continual"
        share = float(arm.split()[1]) if arm.startswith("replay") else 0
        row = run.columns | dict(run=run.name, trunk=run.trunk, spent=spent(run, plan), lr=0.01, L_start=3.0, L_old=1.5)
        row |= dict(seed=run.trunk.split("_")[3], L=0.0, N=N, N_active=active, N_total=total, E=E, K=K, G=G)
        row |= dict(D=D2 * (1 - share) if name == "continual" else D, flops=flops, flops_total=flops)
        row |= dict(D1=D - D2, D2=D2) if grew else dict(D1="", D2="")
        row["L"] = law(row) * math.exp(chance.gauss(0, noise))
        ladder.append(home / "runs.csv", row)
    for shape in dict.fromkeys(run.shape for run in plan.values()):
        N, active, *_, G = counts(shape)
        ladder.append(home / "seconds.csv", dict(shape=shape, seconds_a_step=1e-6 * active * (G or 1) ** 0.5))


def chinchilla(row, A=20, alpha=0.3, B=60, beta=0.35):
    return 0.5 + A * row["N"] ** -alpha + B * row["D"] ** -beta


def fine_grained(row):
    return 0.4 + (1.0 * row["G"] ** -0.6 + 8) * row["N_total"] ** -0.25 + 60 * row["D"] ** -0.35


def upcycled(row):
    if not row["D1"]:
        return chinchilla(row) - 0.1 * (row["E"] != "")
    exponent = -0.3 + 0.006 * math.log(row["D1"])
    return 0.5 + 20 * row["N"] ** -0.3 + 30 * row["D1"] ** -0.1 * row["D2"] ** exponent


def continued(row):
    if row["arm"] in ("scratch", "parent", "far scratch"):
        return chinchilla(row)
    return 0.5 + 20 * row["N"] ** -0.3 + 30 * row["D"] ** -0.28 * row["N"] ** -0.05


SAID = {
    "dense": (chinchilla, ("a = 0.5", "near one half each", "of those at hand", "error on the 15 largest")),
    "granularity": (fine_grained, ("gamma = 0.", "best G in FLOPs", "without g, gamma: more than noise allows")),
    "upcycling": (upcycled, ("alpha3 = 0.00", "without alpha3: more than noise allows", "D2* by the fits")),
    "recipes": (upcycled, ("drop less copy", "re-warmed less rate goes on", "AdamW")),
    "stacking": (chinchilla, ("depth learned", "interposed less stacked", "speed-up in FLOPs")),
    "continual": (continued, ("gamma = 0.0", "replay", "far less near: -0.00")),
}


@pytest.mark.parametrize("name", SAID)
def test_a_committed_table_is_enough_for_the_verdict_and_the_figure(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verdict, "TIMES", 40)
    law, says = SAID[name]
    invent(name, tmp_path, law)
    importlib.import_module(name).show(tmp_path)
    said = capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10000
    for text in says:
        assert text in said, said


def test_flops_saved_beyond_what_scratch_has_reached_are_a_bound():
    continual = importlib.import_module("continual")
    scratch = [dict(arm="scratch", shape="a", seed=1, D=D, L=L) for D, L in ((1e6, 2.0), (2e6, 1.8), (4e6, 1.6))]
    said = lambda D, L: continual.say_saved([*scratch, dict(arm="x", shape="a", seed=1, D=D, L=L)], dict(arm="x"))
    assert said(1e6, 1.8) == "+50 % (one seed)"
    assert said(1e6, 1.59) == "above 75 %"
    assert said(4e6, 1.59) == "outside"
    assert said(1e6, 2.1) == "outside"


def test_a_model_that_copies_has_the_second_copy_cheaper(tmp_path, monkeypatch):
    dense = importlib.import_module("dense")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dense, "PYTHON", f"python={EXPERIMENTS}/*.py")
    listed = dense.climb("dense", "16x1", [1024, 2048], 1)
    (tmp_path / listed[1].name).mkdir()  # the other one was not run

    def copying(_):  # sure of the byte that came 127 bytes before the last one
        return lambda ids: (20 * torch.nn.functional.one_hot(ids.roll(127, 1), 256).float(), None, None)

    monkeypatch.setattr("checkpoint.load", copying)
    dense.copies(listed, tmp_path, tmp_path)
    (row,) = csv.DictReader(open(tmp_path / "copies.csv"))
    assert row["run"] == listed[1].name and float(row["second"]) < 1e-3 and float(row["first"]) > 10


def test_an_optimizer_is_judged_at_equal_tokens_and_at_equal_seconds(tmp_path, capsys):
    """A step of Muon that takes 1.6 times as long: it reads 1 / 1.6 of what AdamW reads meanwhile."""
    module = importlib.import_module("optimizers")
    invent("optimizers", tmp_path, lambda row: 3 - 0.1 * math.log(row["D"]) - 0.05 * (row["optimizer"] == "muon"), 0)
    (tmp_path / "seconds.csv").unlink()
    for shape in module.STEPS:
        for optimizer, taken in (("adamw", 1.0), ("muon", 1.6)):
            row = dict(shape=shape, optimizer=optimizer, seconds_a_step=taken, dtype="float32", threads=2)
            ladder.append(tmp_path / "seconds.csv", row)
    module.show(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert "| of Muon / of AdamW |" + " 1.60 |" * len(module.STEPS) in said
    second = next(line for line in said if line.startswith("| 64x3 | 2 M"))
    assert "| -0.05 (-0.05 to -0.05) | -0.003 (-0.003 to -0.003) |" in second  # -0.05 + 0.1 ln 1.6
    assert any("outside" in line for line in said)  # Muon's shortest run takes longer than AdamW's


def test_six_panels_from_six_tables(tmp_path, monkeypatch):
    six = importlib.import_module("six_papers")
    for name, (law, _) in SAID.items():
        invent(name, tmp_path / name, law)
    monkeypatch.setattr(six, "home_of", tmp_path.joinpath)
    monkeypatch.setattr(six, "PICTURE", tmp_path / "six.png")
    six.main()
    assert all(len(axes.lines) > 1 for axes in six.plt.gcf().axes)
    assert (tmp_path / "six.png").stat().st_size > 50000


# ---- from text to table ---------------------------------------------------------------------------------------------

TINY = """
import contextlib, importlib, io, os, sys
from pathlib import Path
sys.path[:0] = [{experiments!r}, {root!r}]
import torch, ladder, papers
torch.set_num_threads(1)

def call(command):  # the same programs, but in this process: Python and PyTorch start once
    script, *args = map(str, command)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            code = importlib.import_module(Path(script).stem).main(args)
        except SystemExit as left:
            code = left.code
    assert not code, (script, args)
    print("called", Path(script).stem, flush=True)

ladder.call = call
base = papers.climb("base", "16x1", [], 1, also=[1024])
made = papers.grown("upcycle.py", (base[0], 1024), "16x1 4x2", "--experts", 4, "--top-k", 2)
runs = [*base, made, *papers.climb("upcycled", "16x1 4x2", [2048, 4096], 1, parent=(made, None))]
for _ in range(2):
    papers.work(runs, Path("home"), Path("out"), (1, 1))
    print("---")
"""


def test_a_plan_is_trained_from_text_to_table_and_not_twice(tmp_path):
    """And a row has the columns that `invent` gives the verdicts above."""
    code = TINY.format(experiments=str(EXPERIMENTS), root=str(EXPERIMENTS.parent))
    env = os.environ | {"SCALE": "tiny", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, _ = done.stdout.split("---")
    assert first.count("called train") == 6 and first.count("called upcycle") == 1  # two of them sweep one rate each
    assert "called" not in second
    rows = list(csv.DictReader(open(tmp_path / "home/runs.csv")))
    columns = [[float(r[name]) for name in ("budget", "D1", "D2", "D")] for r in rows]
    assert columns == [[2048, 1024, 2048, 3072], [4096, 1024, 4096, 5120]]
    assert rows[1]["spent"] == "16x1:1024+16x1 4x2:3072+16x1 4x2:1024"
    assert float(rows[0]["L"]) != float(rows[1]["L"]) and rows[0]["L_start"] == rows[1]["L_start"]
    assert max(float(r["L"]) for r in rows) < float(rows[0]["L_start"])
    assert rows[0]["lr"] == rows[1]["lr"] == "0.003" and rows[0]["E"] == "4.0" and rows[0]["seed"] == "1"
    invent("upcycling", tmp_path / "invented", upcycled)
    assert {*rows[0]} == {*next(csv.DictReader(open(tmp_path / "invented/runs.csv")))} | {"corpus"}
