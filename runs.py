"""
A run's folder as a table: what the trainer writes, and what the laws read.

    python runs.py table out/*/ [--corpus python] [--seeds] > runs.csv
    python runs.py compare out/scratch out/stacked [--plot loss.png] [--json]

train.py writes two tables into a run's folder: log.csv, a row a logged step, and eval.csv, a row an evaluation.
run.json says where the run came from. `read_run` puts them together. `table` makes one row of each run, for laws.py:

    L   loss at the end            D   tokens in the whole lineage             flops        of this run
    N   size, see the README       D1  before the last upcycling or growth     flops_total  with its ancestors
    E K G  of a mixture            D2  after it                                seed, corpus, optimizer, schedule

What is unknown stays empty: nothing is guessed. An unfinished run is left out and named. `compare` asks how many FLOPs
two runs need to the same loss, those of their ancestors included: a grown model has to pay for the small one.
"""

import csv
import json
import signal
import sys
from pathlib import Path
from shlex import quote
from statistics import fmean, stdev

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback

from files import read_json, replacing
from tables import DAMAGE, Commands, column, number, read_csv, show, whole

# ----------------------------------------------------------------------------------------------------------------------
# What the trainer writes.


def open_table(path, columns, step):
    """Makes a CSV with these columns, or cuts one back to the rows up to `step`: a resumed run writes them again."""
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
    with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def add_row(path, columns, row):
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow([row[c] for c in columns])


def summarise(out, rulers, losses, bits, load, sample, text=True):
    """The end of a run on one screen: the loss against the n-gram ruler, the plot, the sample, what to do next.

    rulers {corpus: its 1-, 2-, 3-gram losses}, losses {corpus: nats a token}, bits {corpus: bits a byte}, load (layers,
    experts) tokens of the last step or None, sample: a text; text: whether its tokenizer can read one.
    """
    print("\nvalidation loss            nats/token  bits/byte     1-gram  2-gram  3-gram counts of its training text")
    for name, ruler in rulers.items():
        better = [n for n in (1, 2, 3) if losses[name] < ruler[n - 1]]
        verdict = f"below {better[-1]}-gram counts" if better else "above all of them: hardly trained"
        grams = "  ".join(f"{r:.4f}" for r in ruler)
        print(f"  {name:<24} {losses[name]:>10.4f} {bits[name]:>10.4f}     {grams}  {verdict}")
    if load is not None:
        print("\nload of each expert in the last step, a row a layer ('.' none, 5 an even share, 9 about twice it)")
        for i, row in enumerate((load / load.mean(-1, keepdim=True)).tolist()):
            print(f"  layer {i:>2}  " + "".join("." if v == 0 else str(min(9, max(1, round(5 * v)))) for v in row))
    plot(out, rulers)
    print(f"\n{sample}")
    print(f"written: {out}/  (model.safetensors, run.json, log.csv, eval.csv, samples.txt, loss.png)\nnext:")
    out = quote(str(out))
    if text:
        print(f'  python model.py {out} --prompt "def "')
    if load is None:
        print(f"  python train.py --init {out} --upcycle 8x2   # a mixture of experts from it")
    print(f"  python train.py --init {out} --stack 2       # a deeper model from it")
    if text and [*rulers] == ["python"]:
        print(f"  python train.py --init {out} --data cpp:0.9,python:0.1   # another language, with 10 % replay")


def plot(out, rulers):
    """loss.png: training and validation loss over tokens, the n-gram losses as lines across. The validation loss before
    the first step is left out if there are two more; the first training losses may lie above the frame."""
    from plots import count_ticks, plain, plt

    logged, evaluated = read_csv(out / "log.csv"), read_csv(out / "eval.csv")
    numbers = lambda rows, name: column(out, rows, name, least=0)
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.plot(numbers(logged, "tokens"), numbers(logged, "loss"), color="0.8", linewidth=1, label="training")
    tokens, top = numbers(evaluated, "tokens"), 0.0
    for i, (name, ruler) in enumerate(rulers.items()):
        losses = numbers(evaluated, f"{name}_loss")
        first = len(losses) > 2
        top = max(top, *losses[first:], *ruler)
        axes.plot(tokens[first:], losses[first:], "o-", color=f"C{i}", markersize=3, label=f"validation, {plain(name)}")
        for n, level in enumerate(ruler, 1):
            axes.axhline(level, color=f"C{i}", linewidth=0.8, linestyle=":")
            x, side = (tokens[-1], "right") if i % 2 == 0 else (0, "left")
            axes.text(x, level, f"{plain(name)} {n}-gram", fontsize=7, color=f"C{i}", ha=side, va="bottom")
    axes.set(xlabel="tokens of this run", ylabel="loss, nats a token", title=plain(str(out)))
    axes.set_ylim(top=1.05 * top)
    count_ticks(axes.xaxis)
    axes.legend(frameon=False)
    figure.savefig(out / "loss.png", dpi=150)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# What the laws read.


def total(steps, what):
    """The sum of steps' tokens or flops; None (unknown) if one of them is: nothing is guessed."""
    spending = [s for s in steps if s["step"] in ("train", "source") or what in s]  # and ligo.py's
    values = [s.get(what) for s in spending]
    return None if None in values else sum(number(v, least=0) for v in values)


def share_done(last, N_active):
    """The share of the planned training that is done, 0 to 1. It is 1 if no plan is stored, and at a constant rate,
    where the loss at any step is that of a shorter run; elsewhere the decay is still to come."""
    settings, tokens = last.get("settings") or {}, last["tokens"]
    spent = {"tokens": tokens, "flops": last["flops"], "tokens_per_param": tokens / (N_active or 1)}
    shares = [done / number(settings[name]) for name, done in spent.items() if settings.get(name)]
    if not shares:
        return 1.0
    if settings.get("schedule") == "constant":
        return float(tokens > 0)
    half_step = settings.get("batch_tokens", 0) / 2 / max(tokens, 1)  # a run ends at the whole step nearest to its plan
    return 1.0 if shares[0] * (1 + half_step) >= 1 else shares[0]


def read_run(folder, corpus=None, smooth=1):
    """One run folder as {column: value}, with its evaluations under "curve": [(FLOPs with ancestors, L)].

    L is the mean of the last `smooth` evaluations on `corpus` (default: the heaviest of the last training), the counts
    are those of the last one. FileNotFoundError if there is nothing to read, ValueError if it makes no sense.
    """
    about, config, evals = (Path(folder, name) for name in ("run.json", "config.json", "eval.csv"))
    for file in (about, config, evals):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name} (give a folder that train.py wrote)")
    try:
        about, config, rows = read_json(about), read_json(config), read_csv(evals)
        weights = {name: number(data["weight"], least=0) for name, data in about["lineage"][-1]["data"].items()}
        corpora = [name.removesuffix("_loss") for name in (rows[0] if rows else ()) if name.endswith("_loss")]
        corpus = corpus or max(corpora, key=lambda name: weights.get(name, -1), default=None)
        if corpora and corpus not in corpora:
            raise FileNotFoundError(f"{folder} has no losses on {corpus} (--corpus {', '.join(corpora)})")
        tokens, flops = (column(evals, rows, name, least=0) for name in ("tokens", "flops"))
        L = column(evals, rows, f"{corpus}_loss")
        *before, last = about["lineage"]
        settings = last.get("settings") or {}
        if last["step"] != "train":
            raise ValueError(f"its last step is {last['step']!r}")
        lineage = [*before, {**last, "tokens": tokens[-1], "flops": flops[-1]}]  # as far as the last evaluation
        cut = max((i for i, s in enumerate(lineage) if s["step"] in ("upcycle", "grow")), default=None)
        D1, D2 = (None, None) if cut is None else (total(part, "tokens") for part in (lineage[:cut], lineage[cut:]))
        experts, G = config.get("num_local_experts") or config.get("num_experts"), config.get("granularity", 1)
        E, K, G = (experts / G, config["num_experts_per_tok"] / G, G) if experts else (None, None, None)
        counts = {name: about.get(name) for name in ("N", "N_active", "N_total")}
        C = total(before, "flops")
        for n in counts.values():
            number(n or 1)  # refuses what is none
        return {
            "run": str(folder), "corpus": corpus, "L": fmean(L[-smooth:]), **counts, "E": E, "K": K, "G": G,
            "D": total(lineage, "tokens"), "D1": D1, "D2": D2, "seed": last.get("seed"), "flops": flops[-1],
            "flops_total": total(lineage, "flops"), "lineage": about["lineage"], "config": config,
            "text": (settings.get("tokenizer"), last["data"].get(corpus, {}).get("sha256")),
            "done": share_done(lineage[-1], counts["N_active"]),
            "optimizer": settings.get("optimizer"), "schedule": settings.get("schedule"),
            "curve": [(None if C is None else C + spent, loss) for spent, loss in zip(flops, L)],
        }
    except DAMAGE as wrong:
        raise ValueError(f"{folder} is damaged or no run of train.py: {type(wrong).__name__}, {wrong}") from None


def merge_seeds(runs):
    """Runs that differ in their seed alone become one: mean L and curve, deviation L_sd, how many, all "curves".
    ValueError if two of them have the seeds in common, too, or all losses: nothing about chance is learnt from the same
    run twice."""
    unlike = "seed out init branch overwrite resume save_every log_every micro_batch device compile".split()
    unlike += ["pad_token_id"]  # older folders have none
    groups, merged = {}, []

    def like(d):  # how many tokens of each corpus come in a whole number of steps hangs on their order, too
        return {k: d[k] for k in sorted(d) if k not in unlike and not (k == "tokens" and "weight" in d)}

    for run in runs:  # key: what must be equal, as text
        key = json.dumps([run[k] for k in ("lineage", "config", "corpus", "N_total", "D")] + [len(run["curve"])])
        key = json.loads(key, object_hook=like)
        group, seeds = groups.setdefault(str(key), {}), str([step.get("seed") for step in run["lineage"]])
        if seeds in group:
            raise ValueError(f"{group[seeds]['run']} and {run['run']} have the same seed {run['seed']} (leave one out)")
        if twin := next((other for other in group.values() if other["curve"] == run["curve"]), None):
            why = "their seeds changed nothing: leave one out"
            raise ValueError(f"{twin['run']} and {run['run']} have the same losses ({why})")
        group[seeds] = run
    for group in groups.values():
        group = [*group.values()]
        curves, losses = [run["curve"] for run in group], [run["L"] for run in group]
        merged.append({**group[0], "L": fmean(losses), "runs": len(group), "curves": curves,
                       "L_sd": stdev(losses) if len(group) > 1 else None,
                       "seed": " ".join(str(run["seed"]) for run in group),
                       "curve": [(at[0][0], fmean(loss for _, loss in at)) for at in zip(*curves)]})
    return merged


def flops_to_reach(run, target):
    """FLOPs at which a run first reaches the loss `target`, straight in ln C between evaluations, or ValueError."""
    curve = run["curve"]
    for (c0, l0), (c1, l1) in zip([curve[0], *curve], curve):  # each point and the one before it
        if l1 <= target and c1 > 0:
            return c1 if c0 <= 0 or l0 <= target else c0 * (c1 / c0) ** ((l0 - target) / (l0 - l1))
    lowest = min(loss for _, loss in curve)
    raise ValueError(f"{run['run']} does not train down to a loss of {target:g} (lowest: {lowest:.4f})")


def compare(runs, target=None):
    """The first run against each other one: target_loss, flops_baseline, flops_run and the stacking paper's speedup.

    The target is the higher of the two best losses unless given, so that both reach it. The speed-up is C_scratch /
    C_grown - 1 with the ancestors' FLOPs: 0.5 means that scratch costs half more. A run and its own ancestor share
    the curve up to where the later one begins, so their pair says nothing, and is marked "ancestor".
    ValueError if FLOPs are unknown or the losses are those of different texts.
    """
    first, pairs = runs[0], []
    for run in runs:
        if run["flops_total"] is None:
            raise ValueError(f"{run['run']} has an ancestor of unknown FLOPs (compare runs trained from scratch)")
        if run["corpus"] != first["corpus"]:
            raise ValueError(f"{first['run']} has its loss on {first['corpus']}, {run['run']} on {run['corpus']} "
                             "(choose one with --corpus)")
        if any(None not in pair and pair[0] != pair[1] for pair in zip(run["text"], first["text"])):
            raise ValueError(f"{first['run']} and {run['run']} have another text called {run['corpus']}, or another "
                             "tokenizer (runs on the same text)")
    for run in runs[1:]:
        goal = target or max(min(loss for _, loss in r["curve"]) for r in (first, run))
        scratch, grown = flops_to_reach(first, goal), flops_to_reach(run, goal)
        short, long = sorted((first["lineage"], run["lineage"]), key=len)
        pairs.append({"baseline": first["run"], "run": run["run"], "target_loss": goal, "flops_baseline": scratch,
                      "flops_run": grown, "speedup": scratch / grown - 1,
                      "ancestor": short != long and short == long[: len(short)]})
    return pairs


# ----------------------------------------------------------------------------------------------------------------------
# The command line.


def run_table(args):
    found = {}  # with the snapshots and branches below a folder, each once
    for folder in map(Path, args.runs):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder (give run folders, e.g. out/*/)")
        found |= {f.resolve(): f.parent for f in sorted(folder.rglob("run.json")) if ".partial" not in str(f)}
    lineage_of = lambda about: read_json(about).get("lineage")
    for f, folder in [*found.items()]:
        run = f.parent.parent / "run.json"
        if folder.name.startswith("step-") and run in found and lineage_of(f) == lineage_of(run):
            del found[f]  # a snapshot of the last step is the run again
    logs = dict.fromkeys(f.parent for folder in args.runs for f in sorted(Path(folder).rglob("log.csv")))
    runs, skipped = [], [f"{folder} has no run.json: it was not saved yet" for folder in logs
                         if not (folder / "run.json").exists() and ".partial" not in str(folder)]
    for folder in found.values():
        if not (folder / "eval.csv").is_file():  # e.g. upcycled and not trained since
            skipped.append(f"{folder} has no eval.csv")
        elif (run := read_run(folder, args.corpus, args.smooth))["done"] < 1:
            skipped.append(f"{folder} is left out: {100 * run['done']:.3g} % of its run")
        else:
            runs.append(run)
    if not runs:
        why = "; ".join(skipped) or "a run has run.json and eval.csv"
        raise FileNotFoundError(f"no finished run below {' '.join(args.runs)} ({why})")
    runs = merge_seeds(runs) if args.seeds else runs
    names = "run L N N_active N_total E K G D D1 D2 seed flops flops_total corpus optimizer schedule".split()
    names += ["L_sd", "runs"] if args.seeds else []
    rows = [{name: run[name] for name in names} for run in runs]
    if args.json:
        return {"runs": rows, "skipped": skipped}
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is written as nothing
    corpora = sorted({run["corpus"] for run in runs})
    several = " (these do not compare: choose one with --corpus)" if len(corpora) > 1 else ""
    if not several and len({run["text"] for run in runs}) > 1:
        several = " (these do not compare: it is not the same text, or not the same tokenizer, in all)"
    print(*[f"L is the loss on {', '.join(corpora)}{several}", *skipped], sep="\n", file=sys.stderr)


def run_compare(args):
    runs = [read_run(folder, args.corpus) for folder in args.runs]
    runs = merge_seeds(runs) if args.seeds else runs
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run to compare (give a baseline and at least one other)")
    pairs = compare(runs, args.target)
    if args.plot:
        import plots

        plots.plot_compare(args.plot, runs, pairs)
    if args.json:
        return pairs[0] | {"pairs": pairs}
    print(f"baseline {runs[0]['run']}, loss on {runs[0]['corpus']}, FLOPs with ancestors\n")
    show([["run", "target loss", "FLOPs baseline", "FLOPs run", "speed-up"]] + [
        [p["run"], p["target_loss"], p["flops_baseline"], p["flops_run"], f"{100 * p['speedup']:+.1f} %"]
        for p in pairs])
    for p in pairs:
        if p["ancestor"]:
            print(f"! {p['baseline']} and {p['run']}: one goes on from the other, so they meet where it begins "
                  "(for a speed-up give a run from scratch)")


def main(argv=None):
    parser = Commands("runs.py", "runs.py {table,compare} ... [--help]", __doc__)
    for run, *texts in (
        (run_table, "RUN ... [options] > runs.csv", "finished runs, and those below them, to one CSV"),
        (run_compare, "BASELINE RUN ... [options]", "FLOPs to equal loss, ancestors included", "losses"),
    ):
        sub = parser.command(run, *texts)
        sub.add_argument("runs", nargs="+", metavar="RUN", help="folder written by train.py")
        add = sub.add_argument_group("reading").add_argument
        add("--corpus", metavar="NAME", help="whose loss (default: the heaviest of the last training)")
        add("--seeds", action="store_true", help="average runs that differ only in seed (default: off)")
        if run is run_table:
            add("--smooth", type=whole, default=1, help="evaluations averaged at the end (default: 1)")
        else:
            add("--target", type=number, metavar="L", help="nats a token (default: the higher best)")
    parser.answer(argv)


if __name__ == "__main__":
    main()
