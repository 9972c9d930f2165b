"""laws.py: the papers' numbers, the fitter on data with known answers, run folders, and bad input."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import laws

ROOT = Path(__file__).parent.parent


def run(*arguments, ok=True):
    """laws.py in a process of its own: stdout if ok, else stderr of a refusal."""
    done = subprocess.run([sys.executable, ROOT / "laws.py", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == (0 if ok else 2), done.stderr
    return done.stdout if ok else done.stderr


def refused(capsys, *arguments):
    """The one line in which laws.py refuses its arguments."""
    with pytest.raises(SystemExit) as left:
        laws.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert left.value.code == 2 and printed.out == "" and "Traceback" not in printed.err
    return printed.err.splitlines()[-1]


def said(capsys, *arguments):
    laws.main([str(a) for a in arguments])
    return json.loads(capsys.readouterr().out)


def loss(law, set=None, **at):
    return laws.predict(laws.published(law, set), **at)


def synthetic(law, set=None, n=60, noise=0.01, seed=0, coefficients=None):
    """A run table drawn from a law inside the range of its paper."""
    the, rng = laws.row(law, set), np.random.default_rng(seed)
    fitted = the.fitted | {"C": (1e20, 1e22)}
    table = {c: np.exp(rng.uniform(*np.log(fitted[c]), n)) for c in laws.columns(the.form)}
    if "G" in table:
        table["G"] = 2.0 ** rng.integers(0, 5, n)
    exact = laws.evaluate(the.form, coefficients or the.coefficients, **table)
    return {**table, the.target: exact * np.exp(noise * rng.standard_normal(n))}


def write_table(path, table, **extra):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*table, *extra])
        writer.writerows(zip(*[map(repr, map(float, v)) for v in table.values()], *extra.values()))
    return path


# ---------------------------------------------------------------------------------------------------- the papers


def test_chinchilla_gives_the_replication_s_losses_and_allocations():
    assert loss("chinchilla", N=70e9, D=1.4e12) == pytest.approx(1.973416, abs=1e-6)
    assert loss("chinchilla", "hoffmann", N=70e9, D=1.4e12) == pytest.approx(1.920846, abs=1e-6)
    assert loss("chinchilla", "hoffmann-rounded", N=1e9, D=2e10) == pytest.approx(2.580048, abs=1e-6)
    known = {
        1e20: (8.545e8, 1.950e10, 2.55256),
        5.76e23: (7.235e10, 1.327e12, 1.97397),
        1e25: (3.125e11, 5.333e12, 1.91131),
    }
    for C, NDL in known.items():
        best = laws.optimal(laws.published("chinchilla"), C)
        assert [best[k] for k in "NDL"] == pytest.approx(NDL, rel=5e-4)
        assert 6 * best["N"] * best["D"] == pytest.approx(C)


@pytest.mark.parametrize(
    "set, at, L",
    [
        ("E64", (1e9, 1e10, 1), 3.377234),
        ("E64", (1e9, 1e10, 4), 3.270195),
        ("E64", (4.3e10, 2.894e10, 16), 2.471388),
        ("E16", (1e9, 1e10, 1), 3.231192),
        ("E16", (1e9, 1e10, 8), 3.152478),
    ],
)
def test_fine_grained_law_gives_the_papers_losses(set, at, L):
    assert loss("fine-grained", set, **dict(zip(("N_total", "D", "G"), at))) == pytest.approx(L, abs=1e-6)


def test_fine_grained_dense_law():
    assert loss("fine-grained", "dense", N=1e9, D=1e11) == pytest.approx(2.737572, abs=1e-6)


# E x N_active, D, G, FLOPs, loss of the paper's Table 2
TABLE_2 = [
    (100e6, 4.37e9, 8, 2.95e18, 3.133),
    (1e9, 28.94e9, 16, 1.93e20, 2.491),
    (3e9, 72.90e9, 16, 1.41e21, 2.245),
    (7e9, 137.6e9, 32, 6.46e21, 2.076),
    (70e9, 941.07e9, 32, 4.16e23, 1.694),
    (300e9, 2.96e12, 64, 5.69e24, 1.503),
    (1e12, 7.94e12, 64, 4.97e25, 1.367),
]


@pytest.mark.parametrize("N, D, G, C, L", TABLE_2)
def test_fine_grained_optimum_reproduces_table_2(N, D, G, C, L):
    d = 64 * (N / 12 / 64**2) ** (1 / 3)  # the row's own shape, by the paper's tie of depth and width
    assert (72 * d**2 + 14 * d * 64 * G) * (d / 64) * D == pytest.approx(C, rel=5e-3)
    best = laws.optimal(laws.published("fine-grained"), C)
    assert best["G"] == G and best["L"] == pytest.approx(L, abs=0.03)
    assert [best["N_active"], best["D"]] == pytest.approx([N, D], rel=0.03)
    assert best["N_total"] == pytest.approx(43 * best["N_active"])


def test_continual_allocation_reproduces_equations_8_and_9():
    printed = {"scratch": ((0.324, 0.514), (0.429, 0.571)), "continual": ((4.79, 0.035), (0.385, 0.615))}
    for set, (factors, powers) in printed.items():
        at = [laws.optimal(laws.published("continual", set), C) for C in (1e18, 1e22)]
        for name, factor, power in zip("ND", factors, powers):
            slope = math.log(at[1][name] / at[0][name]) / math.log(1e4)
            assert slope == pytest.approx(power, abs=5e-4)
            assert at[0][name] / 1e18**slope == pytest.approx(
                factor, rel=0.015 if factor < 0.1 else 2e-3
            )  # printed digits


def test_continual_law_tells_its_user_that_its_printed_losses_contradict_its_paper(capsys):
    assert loss("continual", "scratch", N=1e9, D=2e10) == pytest.approx(2.239915, abs=1e-6)
    assert loss("continual", N=1e9, D=2e10) == pytest.approx(2.374257, abs=1e-6)
    assert "against the paper" in said(capsys, "predict", "continual", "--N", "1e9", "--D", "2e10", "--json")["wrong"]
    laws.main(["optimal", "continual", "--flops", "1e20"])
    assert "above the scratch loss" in capsys.readouterr().out


LLAMAS = [(8e9, 15e12, 6.581), (7e9, 2e12, 11.113), (13e9, 2e12, 15.844), (70e9, 2e12, 42.475)]  # N, D, d in 1e9


@pytest.mark.parametrize("N, D, d", LLAMAS)
def test_stacking_time_reproduces_the_papers_recommendations(N, D, d):
    best = laws.growth_time(laws.published("stacking"), N, D)
    assert best["d"] / 1e9 == pytest.approx(d, abs=6e-4) and best["g"] == 4


def test_stacking_refuses_where_the_rule_asks_for_more_than_the_whole_run(capsys):
    line = refused(capsys, "optimal", "stacking", "--N", "410e6", "--D", "8.2e9")
    assert line.startswith("laws.py: error: the rule gives d = 1.98e+10") and "8.2e+09" in line and "410M" in line


UPCYCLED = [
    (1e8, 1e10, 2.7808, 2.5656, 2.5548, 2.4828, 2.4148),
    (5e8, 2e10, 2.4647, 2.2875, 2.3171, 2.2498, 2.1862),
    (1e9, 1e9, 2.7020, 2.6464, 2.5249, 2.4349, 2.3503),
    (7e9, 1e11, 2.0024, 1.8569, 1.9587, 1.9014, 1.8471),
]


@pytest.mark.parametrize("known", UPCYCLED)
def test_upcycling_law_gives_table_2s_losses(known):
    N, D, dense, moe, *upcycled = known
    assert loss("upcycling", "dense", N=N, D=D) == pytest.approx(dense, abs=5e-5)
    assert loss("upcycling", "moe", N=N, D=D) == pytest.approx(moe, abs=5e-5)
    for D1, L in zip((1e10, 1e11, 1e12), upcycled):
        assert loss("upcycling", N=N, D1=D1, D2=D) == pytest.approx(L, abs=5e-5)


CROSSINGS = [
    (1e8, (2.22e9, 1.33e10, 2.55e10, 1.99e11, None)),
    (5e8, (1.68e9, 8.72e9, 1.54e10, 7.44e10, None)),
    (1e9, (1.46e9, 7.07e9, 1.21e10, 5.06e10, None)),
    (7e9, (9.5e8, 3.89e9, 6.14e9, 1.95e10, 1.58e11)),
]


@pytest.mark.parametrize("N, crossings", CROSSINGS)
def test_plan_finds_the_upcycling_papers_crossings(N, crossings):
    for D1, D2 in zip((1e9, 1e10, 2e10, 1e11, 1e12), crossings):
        crossing = laws.plan(N, D1, 1e21)["crossings"]["upcycle = MoE from scratch"]
        assert crossing is None if D2 is None else crossing["D2"] == pytest.approx(D2, rel=4e-3)


def test_plan_prefers_upcycling_below_the_crossing_and_scratch_above_and_has_no_law_for_stacking():
    below, above = laws.plan(1e9, 1e11, 1e20 * 4), laws.plan(1e9, 1e11, 1e20 * 6)  # the crossing lies at 5.06e20
    assert (below["best"], above["best"]) == ("upcycle", "MoE from scratch")
    assert below["ways"]["stack"] is None and "no coefficients" in below["why_null"]["stack"]
    assert below["outside"]["upcycle"] == {} and laws.plan(7e9, 1e11, 1e21)["outside"]["upcycle"] == {"N": 7.0}


def test_interaction_flattens_the_gain_from_new_tokens():
    """The exponent of D2 is alpha2 - alpha3 ln D1: 0.0666 at 1e10, 0.0608 at 1.5e13."""
    for D1, exponent in ((1e10, 0.0666), (1.5e13, 0.0608)):
        floor = 0.165 + 8.53 * 1e9**-0.112
        a, b = (loss("upcycling", N=1e9, D1=D1, D2=D2) - floor for D2 in (1e10, 1e11))
        assert math.log(a / b) / math.log(10) == pytest.approx(exponent, abs=5e-5)


def test_upcycling_optimum_is_one():
    model = laws.published("upcycling")
    best = laws.optimal(model, 1e21)
    for bump in (0.97, 1.03):
        N, D1 = best["N"] * bump, best["D1"]
        D2 = (1e21 - 6 * N * D1) / (6 * laws.active(N, 2))
        assert laws.predict(model, N=N, D1=D1, D2=D2) > best["L"]
        D1 = best["D1"] * bump
        D2 = (1e21 - 6 * best["N"] * D1) / (6 * laws.active(best["N"], 2))
        assert laws.predict(model, N=best["N"], D1=D1, D2=D2) > best["L"]


# -------------------------------------------------------------------------------------------------------- the fit

EVERY = [(law, set) for law, rows in laws.LAWS.items() for set, the in rows.items() if the.coefficients]


@pytest.mark.parametrize("law, set", EVERY)
def test_gradient_is_that_of_the_law(law, set):
    """d ln L / d theta from the terms' shares equals a central difference."""
    the, table = laws.row(law, set), synthetic(law, set, 7)
    names, prefactor, X, offset = laws.design(the.form, table)
    theta = np.array([math.log(the.coefficients[n]) if p else the.coefficients[n] for n, p in zip(names, prefactor)])
    y = np.log(table[the.target])
    share = laws.residuals(theta[None], X, offset, y)[1][:, 0]
    for j in range(len(names)):
        step = 1e-6 * np.eye(len(names))[j]
        up, down = (laws.residuals((theta + s)[None], X, offset, y)[0][0] for s in (step, -step))
        assert np.einsum("kn,kn->n", share, X[:, j]) == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("law, set", EVERY)
def test_fit_of_exact_data_predicts_it_and_finds_its_law(law, set):
    the = laws.row(law, set)
    table = synthetic(law, set, 80, noise=0)
    report = laws.fit(law, table, set)
    assert laws.evaluate(the.form, report["coefficients"], **table) == pytest.approx(table[the.target], rel=2e-4)
    assert report["objective"] < 1e-7 and report["runs"] == 80
    if law in ("chinchilla", "stacking"):
        assert report["coefficients"] == pytest.approx(the.coefficients, rel=0.02)


def test_fit_withstands_outliers_that_least_squares_would_follow():
    table = synthetic("chinchilla", noise=0.003)
    clean = laws.fit("chinchilla", table)["coefficients"]
    table["L"] = np.where(np.arange(60) % 20 == 0, 1.5 * table["L"], table["L"])
    spoilt = laws.fit("chinchilla", table)["coefficients"]
    assert spoilt["E"] == pytest.approx(clean["E"], abs=0.02) and spoilt["beta"] == pytest.approx(
        clean["beta"], abs=0.02
    )


def test_no_start_near_the_optimum_is_needed():
    """The grid's answer is as good as a descent from the coefficients that made the data."""
    for law, set in (
        ("chinchilla", None),
        ("fine-grained", "E64"),
        ("upcycling", "upcycled"),
        ("continual", "continual"),
    ):
        the, table = laws.row(law, set), synthetic(law, set, seed=3)
        names, prefactor, X, offset = laws.design(the.form, table)
        truth = np.array(
            [math.log(the.coefficients[n]) if p else the.coefficients[n] for n, p in zip(names, prefactor)]
        )
        near = laws.polish(X, np.log(table[the.target]), truth)[1]
        assert laws.solve(the.form, table)["f"] <= near * (1 + 1e-6), (law, set)


def test_bootstrap_interval_covers_and_shrinks_with_more_runs():
    width = []
    for n in (60, 240):
        report = laws.fit("chinchilla", synthetic("chinchilla", n=n, seed=1), bootstrap=300)
        for name, (low, high) in report["intervals"].items():
            assert low < laws.published("chinchilla")["coefficients"][name] < high
        width.append(np.diff(report["intervals"]["beta"])[0])
        low, high = laws.band(report, lambda m: laws.predict(m, N=1e9, D=2e10))
        assert low < loss("chinchilla", N=1e9, D=2e10) < high and high - low < 0.05
    assert width[1] < 0.7 * width[0]


def test_blocks_widen_the_interval_when_runs_of_a_trunk_share_their_luck():
    table, rng = synthetic("chinchilla", noise=0.002), np.random.default_rng(5)
    trunk = np.repeat(np.arange(12), 5)
    table["L"] = table["L"] * np.exp(0.01 * rng.standard_normal(12))[trunk]
    alone, together = (laws.fit("chinchilla", table, bootstrap=200, blocks=b) for b in (None, trunk))
    widths = [np.diff(laws.band(r, lambda m: laws.predict(m, N=1e9, D=2e10)))[0] for r in (alone, together)]
    assert widths[1] > 1.15 * widths[0] and alone["objective"] == together["objective"]


def test_floor_of_the_upcycling_law_is_named_as_not_determined():
    report = laws.fit("upcycling", synthetic("upcycling"))
    assert report["undetermined"] == ["E"] and "without it" in report["why"]["E"]
    assert "E" not in laws.fit("chinchilla", synthetic("chinchilla"))["undetermined"]


def test_coefficients_that_no_run_speaks_of_are_named():
    table = synthetic("fine-grained")
    table["G"][:] = 4
    assert {"g", "gamma"} <= {*laws.fit("fine-grained", table)["undetermined"]}
    table = synthetic("chinchilla")
    table["D"][:] = 2e10
    assert {"E", "B", "beta"} <= {*laws.fit("chinchilla", table)["undetermined"]}


def test_comparison_of_nested_forms_keeps_the_term_that_the_data_need_and_only_that():
    needed = laws.fit("continual", synthetic("continual", noise=0.002))
    assert needed["simpler"]["without"] == ["gamma"] and needed["simpler"]["needed"]
    chinchilla = dict(laws.published("continual")["coefficients"], gamma=0.0, B=100.0)
    assert not laws.fit("continual", synthetic("continual", noise=0.01, coefficients=chinchilla))["simpler"]["needed"]


def test_staged_fit_takes_the_frozen_coefficients_from_the_first(tmp_path, capsys):
    first, second = (
        write_table(tmp_path / f"{set}.csv", synthetic("continual", set, noise=0.003))
        for set in ("scratch", "continual")
    )
    stage = said(capsys, "fit", "continual", first, "--set", "scratch", "--json")
    (tmp_path / "first.json").write_text(json.dumps(stage))
    report = said(capsys, "fit", "continual", second, "--first-stage", tmp_path / "first.json", "--json")
    assert report["fixed"] == ["E", "A", "alpha"] and report["coefficients"]["A"] == stage["coefficients"]["A"]
    assert report["coefficients"]["gamma"] == pytest.approx(0.08, abs=0.05) and report["intervals"] == {}


def test_a_law_of_ones_own_is_one_function_and_one_line(monkeypatch):
    def power_law(C):
        return [("a", {"b": -np.log(C)})]

    monkeypatch.setitem(laws.LAWS, "power", {"mine": laws.Row(power_law)})
    C = np.geomspace(1e18, 1e22, 20)
    report = laws.fit("power", {"C": C, "L": 33.7 * C**-0.0579}, bootstrap=20)
    assert report["coefficients"] == pytest.approx({"a": 33.7, "b": 0.0579}, rel=1e-4) and report["undetermined"] == []
    assert laws.predict(report, C=1e23) == pytest.approx(33.7 * 1e23**-0.0579, rel=1e-4)


# ----------------------------------------------------------------------------------------------------- run folders


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
    laws.main(["table", str(tmp_path / "dense"), str(tmp_path / "moe")])
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
    laws.main(["table", str(tmp_path)])
    a, b = rows_of(capsys.readouterr().out)
    assert [a[k] for k in ("D", "D1", "D2", "flops_total")] == ["", "", "100000000.0", ""]
    assert [float(b[k]) for k in ("D", "D1", "D2")] == [2.0001e12, 2e12, 1e8] and b["flops_total"] == ""


def test_table_finds_snapshots_and_branches_below_a_run_once(tmp_path, capsys):
    trunk = make_run(tmp_path / "run", [], [5, 4, 3, 2])
    make_run(tmp_path / "run/branch", [trunk | {"tokens": 5e7, "flops": 5e14}], [4, 2.8])
    snapshot = tmp_path / "run/step-200"  # a whole folder, its logs cut at its step
    make_run(snapshot, [], [5, 4, 3], tokens=2 / 3 * 1e8, flops=2 / 3 * 1e15)
    laws.main(["table", str(tmp_path), str(snapshot)])
    found = {Path(r["run"]).name: r for r in rows_of(capsys.readouterr().out)}
    assert sorted(found) == ["branch", "run", "step-200"]
    assert float(found["step-200"]["L"]) == 3 and float(found["step-200"]["D"]) == pytest.approx(2 / 3 * 1e8)
    assert float(found["branch"]["D"]) == 1.5e8 and float(found["branch"]["flops_total"]) == 1.5e15


def test_table_puts_seeds_together_but_not_other_settings(tmp_path, capsys):
    for seed, last in ((1, 3.0), (2, 3.2), (3, 3.1)):
        make_run(tmp_path / f"s{seed}", [], [5, last], seed=seed)
    make_run(tmp_path / "longer", [], [5, 2.9], tokens=2e8)
    laws.main(["table", str(tmp_path), "--seeds"])
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
        make_run(tmp_path / f"child{seed}", [{"step": "train", "tokens": 1, "flops": 1, "seed": seed}], [3, 2])
    answer = said(capsys, "table", tmp_path / "child1", tmp_path / "child2", "--seeds", "--json")
    assert answer["runs"][0]["runs"] == 2


def test_table_smooths_and_picks_the_corpus_as_asked(tmp_path, capsys):
    make_run(tmp_path / "run", [], [5, 4, 3, 2])
    for flags, L in (([], 2), (["--smooth", "2"], 2.5), (["--corpus", "other"], 9)):
        laws.main(["table", str(tmp_path), *flags])
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
        laws.main(["compare", *folders])
        assert "one goes on from the other" in capsys.readouterr().out
        assert said(capsys, "compare", *folders, "--json")["ancestor"] is True
    laws.main(["compare", str(tmp_path / "scratch"), str(tmp_path / "child")])
    assert "one goes on" not in capsys.readouterr().out


def test_table_feeds_fit_feeds_predict(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(12):
        N, D = float(10 ** rng.uniform(6, 8)), float(10 ** rng.uniform(7, 9))
        make_run(tmp_path / f"out/{i}", [], [8, loss("chinchilla", N=N, D=D)], tokens=D, N=N)
    laws.main(["table", str(tmp_path / "out")])
    (tmp_path / "runs.csv").write_text(capsys.readouterr().out)
    report = said(capsys, "fit", "chinchilla", tmp_path / "runs.csv", "--bootstrap", "20", "--json")
    (tmp_path / "fit.json").write_text(json.dumps(report))
    answer = said(capsys, "predict", "chinchilla", "--N", "1e7", "--D", "1e8", "--fit", tmp_path / "fit.json", "--json")
    assert answer["L"] == pytest.approx(loss("chinchilla", N=1e7, D=1e8), rel=1e-3) and len(answer["interval"]) == 2
    best = said(capsys, "optimal", "chinchilla", "--flops", "1e17", "--fit", tmp_path / "fit.json", "--json")
    assert best["N"] == pytest.approx(laws.optimal(laws.published("chinchilla"), 1e17)["N"], rel=0.01)
    assert best["intervals"]["N"] == pytest.approx([best["N"]] * 2, rel=0.01)  # exact data leave no doubt


def test_plan_with_fits_does_not_mix_them_with_published_rows(tmp_path, capsys):
    for set in ("dense", "upcycled"):
        report = laws.fit("upcycling", synthetic("upcycling", set, noise=0.003), set, bootstrap=20)
        (tmp_path / f"{set}.json").write_text(json.dumps(report))
    answer = said(
        capsys,
        "plan",
        "--have-n",
        "1e8",
        "--have-d",
        "1e10",
        "--flops",
        "1e19",
        "--json",
        "--fit",
        tmp_path / "dense.json",
        "--fit",
        tmp_path / "upcycled.json",
    )
    assert (
        answer["ways"]["MoE from scratch"] is None and answer["ways"]["stack"] is None and answer["best"] == "upcycle"
    )
    assert answer["intervals"]["upcycle"][0] < answer["ways"]["upcycle"] < answer["intervals"]["upcycle"][1]


def test_plots_are_written(tmp_path, capsys):
    table = write_table(tmp_path / "runs.csv", synthetic("upcycling", "dense"))
    laws.main(
        ["fit", "upcycling", str(table), "--set", "dense", "--bootstrap", "20", "--plot", str(tmp_path / "fit.png")]
    )
    laws.main(["plan", "--have-n", "1e9", "--have-d", "1e11", "--flops", "1e21", "--plot", str(tmp_path / "plan.png")])
    for i in (1, 2):
        make_run(tmp_path / f"out/{i}", [], [5, 3 + i / 10], seed=i)
    make_run(tmp_path / "out/3", [], [5, 2], tokens=2e8)
    runs = [str(tmp_path / f"out/{i}") for i in (1, 2, 3)]
    laws.main(["compare", *runs, "--seeds", "--plot", str(tmp_path / "compare.png")])
    for name in ("fit", "plan", "compare"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_empty_columns_are_not_printed(tmp_path, capsys):
    laws.main(["optimal", "chinchilla", "--flops", "1e20"])
    laws.main(["plan", "--have-n", "1e9", "--have-d", "1e11", "--flops", "1e21"])
    table = write_table(tmp_path / "runs.csv", synthetic("chinchilla"))
    laws.main(["fit", "chinchilla", str(table)])
    assert "95 %" not in capsys.readouterr().out
    laws.main(["fit", "chinchilla", str(table), "--bootstrap", "20"])
    assert "95 % interval" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- bad input


def test_help_opens_with_the_commands_and_lists_the_sets():
    text = run("--help")
    assert "python laws.py table out/*/ > runs.csv" in text.split("options")[0]
    assert "besiroglu" in text and "E16" in text
    assert run("predict", "chinchilla", "--N", "1e9", "--D", "20_000_000_000").startswith("L = 2.529")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["predict", "chinchila", "--N", "1e9"], "chinchila"),
        (["predict", "chinchilla", "--N", "1e9"], "--D"),
        (["predict", "chinchilla", "--N", "-1", "--D", "1e9"], "-1"),
        (["predict", "chinchilla", "--N", "x", "--D", "1"], "'x'"),
        (["predict", "chinchilla", "--N", "1", "--D", "1", "--G", "4"], "--G"),
        (["predict", "fine-grained", "--N", "1e9", "--D", "1e9"], "--G"),
        (["predict", "upcycling", "--set", "stacked", "--N", "1", "--D1", "1", "--D2", "1"], "--fit"),
        (["predict", "chinchilla", "--set", "x", "--N", "1", "--D", "1"], "besiroglu"),
        (["optimal", "chinchilla"], "--flops"),
        (["optimal", "chinchilla", "--flops", "nan"], "nan"),
        (["plan", "--have-n", "1e9"], "--have-d"),
        (["predict", "chinchilla", "--N", "1", "--D", "1", "--fit", "no.json"], "no.json"),
        (["table", "nowhere"], "nowhere"),
        (["compare", "nowhere", "x"], "nowhere"),
        (["fit", "chinchilla", "nowhere.csv"], "nowhere.csv"),
        ([], "command"),
        (["plan", "--have-n", "1", "--have-d", "1", "--flops", "1", "--top-k", "9"], "9"),
        (["predict", "chinchilla", "--fi", "x"], "--fi"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(capsys, arguments, says):
    line = refused(capsys, *arguments)
    assert line.startswith("laws.py: error: ") and says in line


def spoil(text, row, old, new):
    lines = text.splitlines()
    lines[row] = lines[row].replace(old, new) if old else new
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "law, edit, says",
    [
        ("chinchilla", lambda t: t.replace("D,L", "tokens,L"), ["no column D", "tokens"]),
        ("fine-grained", lambda t: t.replace("N,", "N_total,"), ["no column G"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "many,1e9,3"), ["row 3", "column N", "'many'"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "1e9,1e9,-3"), ["row 3", "column L", "-3"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "1e9,1e9,0"), ["row 3", "column L", "0"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "1e9,nan,3"), ["row 3", "column D", "nan"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "1e9,,3"), ["row 3", "column D", "leave the row out"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "1e9,1e9"), ["row 3", "column L"]),
        ("chinchilla", lambda t: t + t.splitlines()[5] + "\n", ["row 61 repeats row 5"]),
        ("chinchilla", lambda t: "\n".join(t.splitlines()[:6]), ["5 runs", "6 runs"]),
        ("chinchilla", lambda t: "", ["no column N"]),
        ("chinchilla", lambda t: t.splitlines()[0] + "\n", ["no column N", "no rows"]),
        ("chinchilla", lambda t: t.replace(",", ";"), ["no column N", "N;D;L"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "1,5e9,2e10,3"), ["row 3", "4 cells"]),
        ("chinchilla", lambda t: spoil(t, 0, "N,D,L", "N,N,L"), ["N, N, L", "3 cells"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "1e99,1e9,3"), ["row 3", "column N", "1e99"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "0x10,1e9,3"), ["row 3", "'0x10'"]),
        ("chinchilla", lambda t: spoil(t, 3, "", "9" * 200_000 + ",1,3"), ["is not CSV"]),
        ("chinchilla", lambda t: spoil(t, 3, "", '"1e9,1e9,3'), ["row 3", "column N"]),
        ("chinchillas", lambda t: t, ["no law called 'chinchillas'"]),
    ],
)
def test_bad_tables_are_refused_with_row_and_column_and_left_alone(tmp_path, capsys, law, edit, says):
    path = write_table(tmp_path / "runs.csv", synthetic("chinchilla"))
    path.write_text(edit(path.read_text().replace("\r", "")))
    before = path.read_bytes()
    line = refused(capsys, "fit", law, path, "--plot", tmp_path / "fit.png")
    assert all(word in line for word in says), line
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["runs.csv"]


def test_a_refused_row_of_a_table_is_called_by_its_run(tmp_path, capsys):
    path = write_table(tmp_path / "runs.csv", synthetic("chinchilla"), run=[f"out/{i}" for i in range(60)])
    text = path.read_text()
    path.write_text(text + text.splitlines()[5].replace("out/4", "out/again") + "\n")
    assert "row 61 (out/again) repeats row 5 (out/4) in N, D, L" in refused(capsys, "fit", "chinchilla", path)
    path.write_text(spoil(text, 3, "", "1e9,,3,out/2"))
    assert "row 3 (out/2), column D" in refused(capsys, "fit", "chinchilla", path)


def test_a_table_from_a_spreadsheet_is_read(tmp_path, capsys):
    """A byte order mark, Windows line ends, blank lines and foreign columns do no harm."""
    path = write_table(tmp_path / "runs.csv", synthetic("chinchilla"), note=["a, b"] * 60)
    plain = said(capsys, "fit", "chinchilla", path, "--json")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\r\n\r\n"))
    assert said(capsys, "fit", "chinchilla", path, "--json") == plain


@pytest.mark.parametrize(
    "change",
    [
        {"law": "no such law"},
        {"law": [1]},
        {"set": "E64"},
        {"coefficients": {}},
        {"coefficients": dict.fromkeys(("E", "A", "B", "alpha", "beta"), "x")},
        {"coefficients": dict.fromkeys(("E", "A", "B", "alpha", "beta"), -1)},
        {"coefficients": dict.fromkeys(("E", "A", "B", "alpha", "beta"), 1e999)},
        {"refits": 3},
        {"refits": [[1, "a", 1, 1, 1]] * 20},
        {"percentiles": None},
        {"intervals": None},
        {"fitted": {}},
        {"fitted": {"N": ["a"], "D": [1]}},
        {"undetermined": [1]},
    ],
)
def test_a_damaged_fit_is_refused_by_all_that_read_one(tmp_path, capsys, change):
    report = laws.fit("chinchilla", synthetic("chinchilla"), bootstrap=20)
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(report | change))
    table = write_table(tmp_path / "runs.csv", synthetic("continual"))
    for arguments in (
        ["predict", "chinchilla", "--N", "1e9", "--D", "1e10", "--fit", path],
        ["optimal", "chinchilla", "--flops", "1e20", "--fit", path, "--json"],
        ["plan", "--have-n", "1e9", "--have-d", "1e9", "--flops", "1e20", "--fit", path],
        ["fit", "continual", table, "--first-stage", path],
    ):
        assert f"{path} is not a fit" in refused(capsys, *arguments)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, "\0"])
def test_what_is_no_fit_is_refused(tmp_path, capsys, text):
    (tmp_path / "fit.json").write_text(text)
    at = ["--N", "1e9", "--D", "1e10", "--fit", tmp_path / "fit.json"]
    assert "is not a fit" in refused(capsys, "predict", "chinchilla", *at)


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "1e99", "1e400", "", "1,5e9", "many"])
def test_numbers_that_are_none_are_refused_by_every_subcommand(capsys, number):
    for arguments in (
        ["predict", "chinchilla", "--N", number, "--D", "1e9"],
        ["optimal", "chinchilla", "--flops", number, "--json"],
        ["plan", "--have-n", number, "--have-d", "1e9", "--flops", "1e20"],
        ["compare", "a", "b", "--target", number],
        ["table", "a", "--smooth", number],
        ["fit", "chinchilla", "a", "--bootstrap", number],
    ):
        assert refused(capsys, *arguments).startswith("laws.py: error: argument --")


@pytest.mark.parametrize("C", [1e-50, 1e3, 1e15, 1e40, 1e59])
@pytest.mark.parametrize("law, set", [each for each in EVERY if each[0] != "stacking"])
def test_absurd_budgets_end_in_a_number_or_a_sentence(law, set, C):
    try:
        best = laws.optimal(laws.published(law, set), C)
    except ValueError as refusal:
        assert "no optimum" in str(refusal) or "stay closer" in str(refusal)
    else:
        assert all(math.isfinite(v) and v > 0 for v in best.values())


def test_bad_fits_and_flags_are_refused(tmp_path, capsys):
    table = write_table(tmp_path / "runs.csv", synthetic("chinchilla"))
    (tmp_path / "bad.json").write_text('{"law": "chinchilla"}')
    (tmp_path / "folder.png").mkdir()
    report = laws.fit("chinchilla", synthetic("chinchilla"))
    (tmp_path / "good.json").write_text(json.dumps(report))
    for flags, says in (
        (["--set", "E64"], "E64"),
        (["--blocks", "trunk", "--bootstrap", "9"], "trunk"),
        (["--blocks", "N"], "--bootstrap"),
        (["--plot", "x.txt"], "x.txt"),
        (["--plot", tmp_path / "no/x.png"], "no/x.png"),
        (["--plot", ""], "--plot"),
        (["--plot", tmp_path / "folder.png"], "folder.png"),
        (["--set", ""], "''"),
        (["--bootstrap", "1.5"], "1.5"),
        (["--first-stage", tmp_path / "bad.json"], "bad.json"),
        (["--first-stage", tmp_path / "good.json"], "nothing"),
    ):
        assert says in refused(capsys, "fit", "chinchilla", table, *flags)
    at = ["--N", "1e9", "--D", "1e10", "--G", "1", "--fit", tmp_path / "good.json"]
    assert "fit of chinchilla besiroglu, not of fine-grained" in refused(capsys, "predict", "fine-grained", *at)


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
        "corpus": "latin",
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
    laws.main(["table", str(tmp_path)])
    assert "do not compare" in capsys.readouterr().err


def test_a_folder_that_no_training_has_touched_is_skipped_and_named(tmp_path, capsys):
    make_run(tmp_path / "run", [], [5, 3])
    make_run(tmp_path / "upcycled", [], [5, 3])
    (tmp_path / "upcycled/eval.csv").unlink()
    answer = said(capsys, "table", tmp_path, "--json")
    assert len(answer["runs"]) == 1 and answer["skipped"] == [f"{tmp_path}/upcycled has no eval.csv"]
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
    laws.main(["table", str(tmp_path)])
    printed = capsys.readouterr()
    assert {Path(r["run"]).name for r in rows_of(printed.out)} == {"whole", "flat"}
    for left_out in ("begun is left out: 0 %", "step-8 is left out: 86 %"):
        assert left_out in printed.err
    assert "begun is left out" in refused(capsys, "table", tmp_path / "begun")


def test_fit_refuses_a_table_of_dense_models_and_mixtures(tmp_path, capsys):
    for i, config in enumerate([None] * 3 + [MOE] * 2):
        make_run(tmp_path / f"out/{i}", [], [5, 4 - i / 10], tokens=(i + 1) * 1e8, config=config)
    laws.main(["table", str(tmp_path / "out")])
    (tmp_path / "runs.csv").write_text(capsys.readouterr().out)
    line = refused(capsys, "fit", "chinchilla", tmp_path / "runs.csv")
    assert "row 1 (" in line and "out/0) has E none K none, row 4 (" in line and "out/3) has E 8.0 K 2.0" in line


def test_a_reader_that_leaves_early_ends_it_quietly():
    command = f"{sys.executable} {ROOT / 'laws.py'} --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
