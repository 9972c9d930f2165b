"""What the six scripts of the papers share: a list of runs, the sweeps of the rate, work that terminals divide.

The six are dense, granularity, upcycling, recipes, stacking and continual; optimizers.py works alike. A script lists
its runs (`plan`), and this file does the rest. A run that is whole is not run again, so a second call goes on.

    python experiments/dense.py plan                    # the runs in their order, and about how long they take
    python experiments/dense.py run --share 1/2         # in one terminal, and --share 2/2 in another
    python experiments/dense.py speed                   # processor seconds a step of each shape, in turn
    python experiments/dense.py show                    # tables, verdict and figure, from the committed files alone

    experiments/dense/runs.csv       a row for each run: the columns of `runs.py table`, and those of `columns` below
    experiments/dense/rates.csv      the sweep of the learning rate, for each arm and shape
    experiments/dense/seconds.csv    what `speed` measured
    experiments/dense/figure.png

SCALE=cpu is that, on text that every machine has. SCALE=gpu is larger (experiments/dense/gpu/), SCALE=tiny tries a
script out in a minute or two (out/tiny/dense/). Equal FLOPs are the counted ones of `runs.py`, ancestors included.
"""

import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import ladder
from ladder import ROOT, SETTING, STEP, M, append, pick, read_rows, train

EVALUATED = pick(4096, 65536, 1048576)  # tokens of each validation text
PYTHON = pick(f"python={ROOT}/*.py", "python", "python=packages")
CPP = pick(f"cpp={ROOT}/tests/*.py", "cpp", "cpp")
FIRST_RATE = {"muon": (0.012, 0.003), "adamw": (0.006, 0.012)}  # that a sweep tries: for a new model, for a trained one
RATES = pick(1, 6, 6)  # how many it tries at most
SWEEP = pick(4 * STEP, M, 16 * M)  # tokens of a run in it, at most


# ---- the runs of a paper, as a list ---------------------------------------------------------------------------------


class Run(NamedTuple):
    """One call of train.py, or of an operator, which makes a folder of another one."""

    name: str  # of its folder
    shape: str  # of its model: width x layers, experts x top-k, granularity, as in "64x3 8x2 G4"
    tokens: int  # of this run alone
    trunk: str  # the first run of its family. One process trains a family; a bootstrap draws it as a whole
    flags: tuple = ()
    schedule: tuple = ()  # flags that the sweep of the rate does without
    parent: tuple = ()  # (--init or --branch, name of the run, "" or a snapshot in its folder)
    rate: str = ""  # the sweep that gives its rate; a branch keeps its trunk's
    part: float = 1.0  # of that rate
    script: str = "train.py"
    columns: dict | None = None  # its own in runs.csv; None: not in the table


def model_flags(shape):
    """The flags of a new model of that shape."""
    size, *mixture = shape.split()
    flags = [*zip(("--hidden-size", "--num-hidden-layers"), size.split("x"))]
    for word in mixture:
        flags += [("--granularity", word[1:])] if word[0] == "G" else [*zip(("--experts", "--top-k"), word.split("x"))]
    return [text for pair in flags for text in pair]


def grown(script, parent, shape, *flags, seed=1, tokens=0):
    """The run of an operator on (run, its tokens or None for its end). tokens: that it trains on itself (ligo.py)."""
    run, at = parent
    how = "-".join(str(flag).strip("-").replace(",", "") for flag in (script.removesuffix(".py"), *flags))
    name, flags = f"{run.name}{f'_from-{at}' if at else ''}_{how}", (*flags, "--seed", seed)
    return Run(name, shape, tokens, run.trunk, flags, parent=("", run.name, snapshot(at)), script=script)


def whole(tokens):
    """So many tokens in whole steps, as train.py rounds them."""
    return round(tokens / STEP) * STEP


def snapshot(tokens):
    return f"step-{round(tokens / STEP)}" if tokens else ""


def climb(arm, shape, budgets, seed, optimizer="muon", flags=(), parent=None, also=(), rate=None, part=1.0):
    """[Run]: a trunk at a constant rate, and a branch that decays for each budget in tokens; one run if there is one.

    parent: (run, its tokens or None for its end) to start from, else a new model of that shape. also: tokens at which
    the trunk is kept besides; it need not have budgets. rate: another arm's sweep, of which it takes the `part`."""
    begun = f"_from-{parent[1]}" if parent and parent[1] else ""
    name = f"{arm}_{shape}_{optimizer}_{seed}{begun}".replace(" ", "-")
    start = ("--init", parent[0].name, snapshot(parent[1])) if parent else ()
    flags = (*(() if parent else model_flags(shape)), "--seed", seed, "--optimizer", optimizer, *flags)
    root, rate = parent[0].trunk if parent else name, rate or f"{arm} {shape} {optimizer}"
    columns = [dict(arm=arm, optimizer=optimizer, shape=shape, budget=tokens) for tokens in budgets]
    if len(budgets) == 1 and not also:
        return [Run(name, shape, whole(budgets[0]), root, flags, (), start, rate, part, columns=columns[0])]
    stops = [round(tokens * 0.75 / STEP) for tokens in budgets]
    steps = sorted({*stops, *(round(tokens / STEP) for tokens in also)})
    kept = ("--schedule", "constant", "--save-at", ",".join(str(step * STEP) for step in steps))
    runs = [Run(name, shape, steps[-1] * STEP, root, flags, kept, start, rate, part)]
    for tokens, stop, own in zip(budgets, stops, columns):
        branch = ("--branch", name, f"step-{stop}")
        runs.append(Run(f"{name}-to-{tokens}", shape, whole(tokens - stop * STEP), root, (), (), branch, columns=own))
    return runs


def spent(run, plan):
    """What a run and its ancestors read, as "64x3:1500160+64x3 8x2:500736": tokens of each shape. plan: {name: Run}"""
    parts, tokens = [], run.tokens
    while run:
        parts += [f"{run.shape}:{tokens}"] if tokens else []
        _, name, at = run.parent or ("", "", "")
        run = plan.get(name)
        tokens = int(at.removeprefix("step-")) * STEP if at else run and run.tokens
    return "+".join(reversed(parts))


def seconds(run):
    """About how many processor seconds a run takes on one thread of an EPYC without fast bf16, evaluations and 7 s of
    beginning and end included: 20,000 tokens/s for 64x3, 8,000 for 64x3 8x2, 5,000 for 64x3 8x2 G4."""
    size, *mixture = run.shape.split()
    width, layers = map(int, size.split("x"))
    G = int(mixture[1][1:]) if mixture[1:] else 1
    token = 6 + layers * 0.26 * width + (layers * 25 * G**0.5 * (0.5 + width / 128) if mixture else 0)  # microseconds
    kept = run.schedule[-1].count(",") + 1 if run.schedule else 0
    evaluated = (2 + kept) * EVALUATED if run.script == "train.py" else 0
    return 1e-6 * token * (run.tokens + 0.4 * evaluated) + 7


def needed(plan, known):
    """Names of the runs that are still to be done: those that the table lacks, and what they start from."""
    names = set()
    for run in reversed(plan.values()):
        if run.name in names or (run.columns and run.name not in known):
            names |= {run.name, *run.parent[1:2]}
    return names


def sweeps(plan):
    """The sweeps as runs, each as long as its 3.3 runs on the average."""
    first = {run.rate: run for run in reversed(plan.values()) if run.rate}
    return [run._replace(tokens=3.3 * sweep_tokens(run, plan)) for run in first.values()]


def divide(plan, n):
    """{trunk: share 1 .. n}: each family, in its turn, to the share that has the least to do. The same in every
    terminal, whatever is done already: so no lock is needed. A sweep counts with the family that it tunes first."""
    cost, load, owner = Counter(), [0.0] * n, {}
    for run in [*plan.values(), *sweeps(plan)]:
        cost[run.trunk] += seconds(run)
    for trunk, much in cost.items():
        owner[trunk] = load.index(min(load)) + 1
        load[owner[trunk] - 1] += much
    return owner


# ---- doing it -------------------------------------------------------------------------------------------------------


def next_rate(points, first):
    """The rate to try after [(rate, loss)]; None if the lowest loss has a neighbour, a factor of 2 away, on each side
    (or if there are enough)."""
    if not points:
        return first
    lowest = min(points, key=lambda p: p[1])[0]
    missing = [lr for lr in (lowest / 2, lowest * 2) if all(abs(lr / other - 1) > 0.01 for other, _ in points)]
    return missing[0] if missing and len(points) < RATES else None


def swept(table, rate):
    """[(rate, loss)] of a sweep so far."""
    return [(float(r["lr"]), float(r["loss"])) for r in read_rows(table) if r["rate"] == rate]


def sweep_tokens(run, plan):
    """Tokens of a run in a trunk's sweep: its middle budget, as the best rate falls with length, but SWEEP at most."""
    runs = [run, *(r for r in plan.values() if r.parent[:2] == ("--branch", run.name))]
    budgets = sorted(r.columns["budget"] for r in runs if r.columns)
    return min(SWEEP, budgets[len(budgets) // 2] if budgets else run.tokens)


def tuned(run, plan, home, out, share, patience=7200):
    """The best rate of the run's sweep: the bottom of a parabola. The share that trains the first run of this sweep
    does it, from where that run starts. The others wait; TimeoutError after two hours."""
    from rates import best

    first = next(other for other in plan.values() if other.rate == run.rate)
    owner, table, waited = divide(plan, share[1])[first.trunk], home / "rates.csv", 0
    optimizer, seed = (run.flags[run.flags.index(name) + 1] for name in ("--optimizer", "--seed"))
    while (lr := next_rate(swept(table, run.rate), FIRST_RATE[optimizer][bool(run.parent)])) is not None:
        if owner == share[0]:
            row = {"rate": run.rate, "tokens": sweep_tokens(first, plan), "lr": f"{lr:g}", "seed": seed}
            ladder.grid(table, out / "rates", [row], lambda row: flags_of(run, out, row["lr"], row["tokens"]))
        elif waited < patience:
            print(f"waits for share {owner}/{share[1]} to tune {run.rate}\n" * (not waited), end="", flush=True)
            time.sleep(20)
            waited += 20
        else:
            raise TimeoutError(f"{run.name}: share {owner}/{share[1]} does not tune {run.rate}")
    return float(f"{best([p for p in swept(table, run.rate) if p[1] < math.inf])[0] * run.part:.3g}")


def flags_of(run, out, lr, tokens):
    """The flags of train.py for a run, but for its schedule and --out."""
    kind, name, at = run.parent or ("", "", "")
    start, most = [kind, out / name / at] if kind else [], ["--tokens", tokens, "--eval-tokens", EVALUATED]
    if kind == "--branch":
        return [*start, *most]
    return ["--data", PYTHON, "--warmup", ladder.WARMUP, "--lr", lr, *start, *most, *run.flags]


def make(run, plan, home, out, share):
    """Trains a run, or applies its operator, unless that is done."""
    if run.script != "train.py":
        if not (out / run.name).exists():
            ladder.call([ROOT / run.script, out / run.parent[1] / run.parent[2], out / run.name, *run.flags])
    elif not (out / run.name / "loss.png").exists():
        lr = tuned(run, plan, home, out, share) if run.rate else None
        before = ladder.RHYTHM if run.parent[:1] == ("--branch",) else (*SETTING, *run.schedule)
        train(out / run.name, *before, *flags_of(run, out, lr, run.tokens))


def columns(run, plan, out):
    """The row of a run. Beside the columns of `runs.py table`:

    budget    tokens asked for, from where the arm begins
    trunk     its family: runs of one family are no independent witnesses
    spent     see `spent`
    L_start   loss before the arm's first update
    L_old     loss on the second corpus
    D         here tokens of the corpus that L is about, in the whole lineage"""
    sys.path.insert(0, str(ROOT))
    import runs

    found, first = runs.read_run(out / run.name), run
    while first.parent[:1] == ("--branch",):
        first = plan[first.parent[1]]
    begun, ended = read_rows(out / first.name / "eval.csv")[0], read_rows(out / run.name / "eval.csv")[-1]
    others = [name for name in ended if name.endswith("_loss") and name != f"{found['corpus']}_loss"]
    read = [step["data"].get(found["corpus"], {}).get("tokens", 0) for step in found["lineage"] if "data" in step]
    own = run.columns | {"run": run.name, "trunk": run.trunk, "spent": spent(run, plan)}
    own |= {"lr": found["lineage"][-1]["settings"]["lr"], "L_start": float(begun[f"{found['corpus']}_loss"])}
    own |= {"L_old": float(ended[others[0]]) if others else None}
    names = "seed L N N_active N_total E K G D D1 D2 flops flops_total corpus".split()
    return own | {name: found[name] for name in names} | {"D": sum(read)}


def work(plan, home, out, share):
    """Does this share of a plan [Run]. What fails is named at the end, and the rest is done."""
    plan, failed = {run.name: run for run in plan}, []
    known = {row["run"] for row in read_rows(home / "runs.csv")}
    owner, names = divide(plan, share[1]), needed(plan, known)
    for run in plan.values():
        if run.name not in names or owner[run.trunk] != share[0]:
            continue
        try:
            make(run, plan, home, out, share)
            if run.columns and run.name not in known:
                append(home / "runs.csv", row := columns(run, plan, out))
                print(row["run"], f"L {row['L']:.4f}", flush=True)
        except (RuntimeError, OSError) as wrong:  # TimeoutError is an OSError
            failed.append(run.name)
            print(wrong, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def speed(path, shapes, rounds=15):
    """Seconds of a whole step of train.py for each shape, in turn: processor time of one thread, or a GPU's clock."""
    import torch

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.process_time if device == "cpu" else time.perf_counter
    steps = {shape: ladder.stepper([*SETTING, *model_flags(shape)], device)[0] for shape in shapes}
    path.unlink(missing_ok=True)
    for shape, t in ladder.in_turn(steps, rounds, clock).items():
        row = {"shape": shape, "seconds_a_step": statistics.median(t), "lowest": min(t), "highest": max(t)}
        append(path, {k: v if k == "shape" else f"{v:.5f}" for k, v in row.items()} | {"device": device})
        print(row, flush=True)


# ---- the command line -----------------------------------------------------------------------------------------------


def home_of(name):
    """The folder of a paper's tables and figure."""
    return pick(Path("out/tiny", name), ROOT / "experiments" / name, ROOT / "experiments" / name / "gpu")


def experiment(name, doc, plan, show, before=lambda: None, timed=speed, argv=None, **more):
    """The command line of a script: plan(seeds) lists the runs [Run], show(home) prints from the tables in the folder
    `home`, before() is called before the first run, timed(path, shapes) writes seconds.csv. more: other words and what
    they do with (plan, home, folder of the runs)."""
    parser = ladder.get_parser(doc, ("plan", "run", "speed", "show", *more))
    parser.add_argument("--share", default="1/1", help="1/2 and 2/2 in two terminals divide the work (default: all)")
    default = Path("out/papers", ladder.SCALE, name)
    parser.add_argument("--out", type=Path, default=default, help="folder of runs (default: %(default)s)")
    args = parser.parse_args(argv)
    home, share, listed = home_of(name), tuple(map(int, args.share.split("/"))), plan(args.seeds)
    match args.what:
        case "run":
            before()
            work(listed, home, args.out, share)
        case "speed":
            timed(home / "seconds.csv", list(dict.fromkeys(run.shape for run in listed)))
        case "show":
            try:
                show(home)
            except (ValueError, IndexError) as few:  # a fit says how many runs it needs
                sys.exit(f"{home / 'runs.csv'} is not complete: {few}")
        case "plan":
            show_plan(listed, share[1], home / "runs.csv")
        case word:
            more[word](listed, home, args.out)


def show_plan(listed, n, table):
    """The runs, and the hours that they take by `seconds`; how many the table holds."""
    plan, known = {run.name: run for run in listed}, {row["run"] for row in read_rows(table)}
    owner, load = divide(plan, n), Counter()
    for run in plan.values():
        print(f"{owner[run.trunk]}/{n} {seconds(run):6.0f} s  {spent(run, plan):45} {run.name}")
    for run in [*plan.values(), *sweeps(plan)]:
        load[owner[run.trunk]] += seconds(run) / 3600
    hours = ", ".join(f"share {i} {hours:.2f}" for i, hours in sorted(load.items()))
    print(f"{len(plan)} runs, {len(sweeps(plan))} sweeps, about {sum(load.values()):.1f} core-hours ({hours})")
    rows = {run.name for run in plan.values() if run.columns}
    print(f"{len(rows & known)} of {len(rows)} rows are in {table} (without it `run` trains them again)")
