"""plan.py: the papers' optima and crossings, own fits put to use, and bad input."""

import json
import math
import shlex

import pytest
from test_laws import EVERY, loss, main, refused, said, synthetic, write_table
from test_runs import make_run

import laws
import plan
import runs
import settings


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
        best = plan.optimal(laws.published("chinchilla"), C)
        assert [best[k] for k in "NDL"] == pytest.approx(NDL, rel=5e-4)
        assert 6 * best["N"] * best["D"] == pytest.approx(C)


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
    best = plan.optimal(laws.published("fine-grained"), C)
    assert best["G"] == G and best["L"] == pytest.approx(L, abs=0.03)
    assert [best["N_active"], best["D"]] == pytest.approx([N, D], rel=0.03)
    assert best["N_total"] == pytest.approx(43 * best["N_active"])


def test_continual_allocation_reproduces_equations_8_and_9():
    printed = {"scratch": ((0.324, 0.514), (0.429, 0.571)), "continual": ((4.79, 0.035), (0.385, 0.615))}
    for set, (factors, powers) in printed.items():
        at = [plan.optimal(laws.published("continual", set), C) for C in (1e18, 1e22)]
        for name, factor, power in zip("ND", factors, powers):
            slope = math.log(at[1][name] / at[0][name]) / math.log(1e4)
            assert slope == pytest.approx(power, abs=5e-4)
            assert at[0][name] / 1e18**slope == pytest.approx(
                factor, rel=0.015 if factor < 0.1 else 2e-3
            )  # printed digits


# FLOPs: billions of active parameters and tokens for 1, 2, 4, 8, 16, 32 experts
JOINT = {
    1e20: ((1.7, 9.7), (1.5, 11.4), (1.2, 13.9), (0.99, 17), (0.81, 20.7), (0.669, 24.9)),
    1e21: ((5.7, 29.3), (5, 33), (4.4, 38), (3.8, 44.3), (3.3, 51.2), (2.85, 58.4)),
    1e22: ((18.8, 88.6), (17.4, 96), (15.8, 105.4), (14.4, 115.8), (13.2, 126.5), (12.2, 136.9)),
}


@pytest.mark.parametrize("C", JOINT)
def test_joint_optimum_reproduces_its_papers_table(C):
    for E, known in zip((1, 2, 4, 8, 16, 32), JOINT[C]):
        best = plan.optimal(laws.published("joint"), C, E=E)
        for value, printed in zip((best["N_active"], best["D"]), known):
            last = 10.0 ** -len(f"{printed:.3g}".partition(".")[2])  # 1.7 is printed with two digits: 1.65 to 1.75
            assert value / 1e9 == pytest.approx(printed, rel=0.015, abs=last / 2 if last < 1 else 0), (E, best)


def test_optimum_of_chinchilla_balances_its_two_prices():
    """alpha A N^-alpha = beta B D^-beta, Hoffmann's Eq. 4."""
    for set in laws.LAWS["chinchilla"]:
        model, best = laws.published("chinchilla", set), plan.optimal(laws.published("chinchilla", set), 1e21)
        c = model["coefficients"]
        price = c["alpha"] * c["A"] * best["N"] ** -c["alpha"], c["beta"] * c["B"] * best["D"] ** -c["beta"]
        assert price[0] == pytest.approx(price[1], rel=1e-5)


LLAMAS = [(8e9, 15e12, 6.581), (7e9, 2e12, 11.113), (13e9, 2e12, 15.844), (70e9, 2e12, 42.475)]  # N, D, d in 1e9


@pytest.mark.parametrize("N, D, d", LLAMAS)
def test_stacking_time_reproduces_the_papers_recommendations(N, D, d):
    best = plan.optimal(laws.published("stacking"), N, D)
    assert best["d"] / 1e9 == pytest.approx(d, abs=6e-4) and best["g"] == 4


def test_stacking_refuses_where_the_rule_asks_for_more_than_the_whole_run(capsys):
    line = refused(capsys, "optimal", "stacking", "--N", "410e6", "--D", "8.2e9")
    assert line.startswith("plan.py: error: the rule gives d = 1.98e+10") and "8.2e+09" in line and "410M" in line


CROSSINGS = [
    (1e8, (2.22e9, 1.33e10, 2.55e10, 1.99e11, None)),
    (5e8, (1.68e9, 8.72e9, 1.54e10, 7.44e10, None)),
    (1e9, (1.46e9, 7.07e9, 1.21e10, 5.06e10, None)),
    (7e9, (9.5e8, 3.89e9, 6.14e9, 1.95e10, 1.58e11)),
]


@pytest.mark.parametrize("N, crossings", CROSSINGS)
def test_plan_finds_the_upcycling_papers_crossings(N, crossings):
    for D1, D2 in zip((1e9, 1e10, 2e10, 1e11, 1e12), crossings):
        crossing = plan.budget(N, D1, 1e21)["crossings"]["upcycle = MoE from scratch"]
        assert crossing is None if D2 is None else crossing["D2"] == pytest.approx(D2, rel=4e-3)


def test_plan_names_every_budget_at_which_two_ways_swap_places(capsys):
    """With 7e11 tokens behind it the upcycled model loses to the MoE from scratch, and wins again later."""
    answer = plan.budget(1e9, 7e11, 6e22)
    swaps = answer["swaps"]["upcycle = MoE from scratch"]
    assert [x["D2"] for x in swaps] == pytest.approx([1.329e12, 4.002e12], rel=1e-3)
    assert [x["then"] for x in swaps] == ["MoE from scratch", "upcycle"] and answer["best"] == "upcycle"
    assert answer["crossings"]["upcycle = MoE from scratch"] == swaps[0]
    for x in swaps:
        before, after = (plan.budget(1e9, 7e11, x["flops"] * factor)["best"] for factor in (0.95, 1.05))
        assert before != after == x["then"]
    main("budget", "--have-n", 1e9, "--have-d", 7e11, "--flops", 6e22)
    assert "again at 4.002e+22 FLOPs (D2 of the MoE 4.002e+12); beyond it upcycle" in capsys.readouterr().out


def test_plan_prefers_upcycling_below_the_crossing_and_scratch_above_and_has_no_law_for_stacking():
    below, above = plan.budget(1e9, 1e11, 1e20 * 4), plan.budget(1e9, 1e11, 1e20 * 6)  # the crossing lies at 5.06e20
    assert (below["best"], above["best"]) == ("upcycle", "MoE from scratch")
    assert below["ways"]["stack"] is None and "no coefficients" in below["why_null"]["stack"]
    assert below["outside"]["upcycle"] == {} and plan.budget(7e9, 1e11, 1e21)["outside"]["upcycle"] == {"N": 7.0}


def test_upcycling_optimum_is_one():
    model = laws.published("upcycling")
    best = plan.optimal(model, 1e21)
    for bump in (0.97, 1.03):
        N, D1 = best["N"] * bump, best["D1"]
        D2 = (1e21 - 6 * N * D1) / (6 * laws.active(N, 2))
        assert laws.predict(model, N=N, D1=D1, D2=D2) > best["L"]
        D1 = best["D1"] * bump
        D2 = (1e21 - 6 * best["N"] * D1) / (6 * laws.active(best["N"], 2))
        assert laws.predict(model, N=best["N"], D1=D1, D2=D2) > best["L"]


def test_plan_with_fits_does_not_mix_them_with_published_rows(tmp_path, capsys):
    for set in ("dense", "upcycled"):
        report = laws.fit("upcycling", synthetic("upcycling", set, noise=0.003), set, bootstrap=20)
        (tmp_path / f"{set}.json").write_text(json.dumps(report))
    answer = said(
        capsys,
        "budget",
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


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "1e99", "1e400", "", "1,5e9", "many"])
def test_numbers_that_are_none_are_refused_by_every_subcommand(capsys, number):
    for arguments in (
        ["predict", "chinchilla", "--N", number, "--D", "1e9"],
        ["optimal", "chinchilla", "--flops", number, "--json"],
        ["budget", "--have-n", number, "--have-d", "1e9", "--flops", "1e20"],
        ["compare", "a", "b", "--target", number],
        ["table", "a", "--smooth", number],
        ["fit", "chinchilla", "a", "--bootstrap", number],
    ):
        assert refused(capsys, *arguments).split(".py: error: ")[1].startswith("argument --")


@pytest.mark.parametrize("C", [1e-50, 1e3, 1e15, 1e40, 1e59])
@pytest.mark.parametrize("law, set", [each for each in EVERY if each[0] != "stacking"])
def test_absurd_budgets_end_in_a_number_or_a_sentence(law, set, C):
    try:
        best = plan.optimal(laws.published(law, set), C, **({"E": 8} if law == "joint" else {}))
    except ValueError as refusal:
        assert "no optimum" in str(refusal) or "stay closer" in str(refusal)
    else:
        assert all(math.isfinite(v) and v > 0 for v in best.values())


def test_continual_law_tells_its_user_that_its_printed_losses_contradict_its_paper(capsys):
    assert loss("continual", "scratch", N=1e9, D=2e10) == pytest.approx(2.239915, abs=1e-6)
    assert loss("continual", N=1e9, D=2e10) == pytest.approx(2.374257, abs=1e-6)
    assert "against the paper" in said(capsys, "predict", "continual", "--N", "1e9", "--D", "2e10", "--json")["wrong"]
    plan.main(["optimal", "continual", "--flops", "1e20"])
    assert "above the scratch loss" in capsys.readouterr().out


def test_plots_are_written(tmp_path, capsys):
    table = write_table(tmp_path / "runs.csv", synthetic("upcycling", "dense"))
    laws.main(
        ["fit", "upcycling", str(table), "--set", "dense", "--bootstrap", "20", "--plot", str(tmp_path / "fit.png")]
    )
    have = ["--have-n", "1e9", "--have-d", "1e11", "--flops", "1e21"]
    plan.main(["budget", *have, "--plot", str(tmp_path / "plan.png")])
    for i in (1, 2):
        make_run(tmp_path / rf"o_$\x$/{i}", [], [5, 3 + i / 10], seed=i)
    make_run(tmp_path / r"o_$\x$/3", [], [5, 2], tokens=2e8)
    folders = [str(tmp_path / rf"o_$\x$/{i}") for i in (1, 2, 3)]
    runs.main(["compare", *folders, "--seeds", "--plot", str(tmp_path / "compare.png")])
    for name in ("fit", "plan", "compare"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_empty_columns_are_not_printed(tmp_path, capsys):
    plan.main(["optimal", "chinchilla", "--flops", "1e20"])
    plan.main(["budget", "--have-n", "1e9", "--have-d", "1e11", "--flops", "1e21"])
    table = write_table(tmp_path / "runs.csv", synthetic("chinchilla"))
    laws.main(["fit", "chinchilla", str(table)])
    assert "95 %" not in capsys.readouterr().out
    laws.main(["fit", "chinchilla", str(table), "--bootstrap", "20"])
    assert "95 % interval" in capsys.readouterr().out


def folder_of_a_run(path, **changes):
    path.mkdir()
    config = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=2)
    lineage = [{"step": "train", "tokens": 3e9}, {"step": "grow"}, {"step": "train", "tokens": 7e9}]
    run = {"N": 1e9, "N_total": 1e9, "lineage": lineage} | changes
    (path / "config.json").write_text(json.dumps(config))
    (path / "run.json").write_text(json.dumps(run))
    return str(path)


def test_budget_reads_a_folder_and_prints_the_winners_command(tmp_path, capsys):
    mine = folder_of_a_run(tmp_path / "run")
    answer = said(capsys, "budget", "--have", mine, "--flops", 4e20, "--json")
    same = said(capsys, "budget", "--have-n", 1e9, "--have-d", 1e10, "--flops", 4e20, "--json")
    assert answer["ways"] == same["ways"]
    D2 = answer["tokens"][answer["best"]]
    commands = {way: plan.command(way, D2, mine, *plan.have(mine)[2:4], 8, 2) for way in answer["ways"]}
    assert answer["command"] == commands[answer["best"]]
    for way, words in {"train on": [], "upcycle": ["--upcycle", "8x2"], "stack": ["--stack", str(laws.GROW)]}.items():
        assert commands[way].split() == ["python", "train.py", "--init", mine, *words, "--tokens", f"{D2:.4g}"]
    shape = "--hidden-size 64 --intermediate-size 176 --num-hidden-layers 3 --num-attention-heads 2"
    assert commands["MoE from scratch"] == f"python train.py {shape} --experts 8 --top-k 2 --tokens {D2:.4g}"
    config = {"model_type": "llama", "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 500000.0}
    own = {"data": "my notes.txt", "context": 4096, "batch_tokens": 8192, "tokenizer": "gpt2"}
    like = plan.flags_like(mine, config, own)
    text = f"--data 'my notes.txt' --context 4096 --batch-tokens 8192 --rope-theta 500000.0 --tokenizer {mine}"
    assert like == f"--head-dim 16 {text} --no-qk-norm --tie-word-embeddings"
    assert plan.command("upcycle", 1e6, mine, config, own, 8, 2).endswith("8x2 --batch-tokens 8192 --tokens 1e+06")
    assert plan.command("train on", 166.7, mine, {}, {}, 8, 2).endswith(" --tokens 167")
    for command in (*commands.values(), f"python train.py {like}"):  # train.py knows the flags
        settings.read_flags(settings.get_parser(), shlex.split(command)[2:])


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"N_total": 5e9}, "is a mixture"),
        ({"lineage": [{"step": "source", "tokens": None}]}, "nobody knows its source's tokens"),
        ({"lineage": None}, "is no run's folder"),
        ({"lineage": [{"step": "train", "tokens": 1}, {"step": "grow", "operator": "random"}]}, "has a closed mask"),
        ({"N": "many"}, "is no run's folder"),
    ],
)
def test_a_folder_that_budget_cannot_start_from_is_refused(tmp_path, capsys, changes, says):
    folder = folder_of_a_run(tmp_path / "run", **changes)
    assert says in refused(capsys, "budget", "--have", folder, "--flops", 1e20)


def test_budget_says_what_train_py_counts_beyond_6_N(tmp_path, capsys):
    last = {"step": "train", "tokens": 1e9, "flops": 8e18, "settings": {}}
    folder = folder_of_a_run(tmp_path / "run", lineage=[last])
    notes = said(capsys, "budget", "--have", folder, "--flops", 1e20, "--json")["notes"]
    assert "train.py counts head and attention, too: of this model 8e+09 FLOPs a token, where 6 N is 6e+09" in notes
    folder = folder_of_a_run(tmp_path / "grown", lineage=[last, {"step": "grow"}])  # that was a smaller model
    assert "head and attention" not in str(said(capsys, "budget", "--have", folder, "--flops", 1e20, "--json")["notes"])


def test_a_small_budget_finds_the_swap_that_is_near_it(capsys):
    have = ("budget", "--have-n", 1e5, "--have-d", 2e6, "--json", "--flops")
    small, large = said(capsys, *have, 1e9), said(capsys, *have, 1e13)
    assert small["best"] == "train on" and large["best"] == "upcycle"
    [swap] = small["swaps"]["train on = upcycle"]
    assert swap["then"] == "upcycle" and 1e9 < swap["flops"] < 1e13 and swap["D2"] < 1e7
    main("budget", *map(str, have[1:5]), "--flops", "1e13")
    assert "train on = upcycle: " in (text := capsys.readouterr().out) and "never" not in text


def test_budget_needs_a_model_and_only_one(tmp_path, capsys):
    for have in ([], ["--have-n", "1e9"], ["--have", folder_of_a_run(tmp_path / "run"), "--have-d", "1e9"]):
        assert "--have-d" in refused(capsys, "budget", *have, "--flops", 1e20)
