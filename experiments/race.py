"""How low is the loss when the coffee is ready? nanoGPT's recipe for a CPU against the default run of train.py.

    python experiments/race.py                           # about 50 minutes; a second call goes on with it
    python experiments/race.py --dtype auto float32      # ours in fp32, too: nanoGPT's recipe always is
    python experiments/race.py -- --num-hidden-layers 4  # ours with other flags of train.py
    python experiments/race.py show                      # the tables, from race.csv (or another --table)

Each row of race.csv is one whole training in a process of its own, one after the other. Its schedule ends when the
seconds asked for are over, so the loss at 100 s is that of a run for 100 s, not of a longer one on its way. The number
of tokens comes from the median speed of that racer's rows so far, at first from a short run that is not counted.
Round r has seed r, and the racers take turns in going first. Use a machine that does nothing else, and another --table
on another machine.

- Both read the default text of train.py, bytes of Python, and are evaluated on the same validation bytes: in windows of
  256, which are those of train.py. nanoGPT's model has no positions beyond its context of 64: it gets each of these
  windows in four pieces. `loss_at_64` is the loss of ours on these pieces, so that nobody can say that context decides.
- Seconds are of training alone, from the first batch to the last update: no start of a process, no preparing of text,
  no evaluation, sample or checkpoint. For train.py they are the sum of new tokens / tokens_per_second over log.csv: the
  clock of that column stands still while train.py evaluates, samples and saves; that of the column seconds does not.
- nanoGPT's rows serve every --dtype and all flags of ours on the same number of threads.
"""

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from nanogpt import CONTEXT, evaluate, get_corpus

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
import horizon

PROBE = 200_000  # tokens of the run that is not counted


class Racer(NamedTuple):
    who: str
    dtype: str
    flags: str
    threads: int


COLUMNS = {"round": int, "seed": int, **Racer.__annotations__, "seconds_asked": float,
           "seconds": float, "tokens": int, "loss": float, "loss_at_64": float}  # fmt: skip


def call(script, *flags):
    """Runs a script and returns what it prints. Its threads are as many as ours: torch asks the same environment."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"race.py: {script} failed:\n{done.stderr}")
    return done.stdout


def train(racer, tokens, seed, out):
    """One training -> {seconds, tokens, loss, loss_at_64}. Ours leaves its folder in `out`."""
    if racer.who == "nanoGPT":
        result = json.loads(call("experiments/nanogpt.py", "--tokens", tokens, "--seed", seed))
        return result | {"loss_at_64": result["loss"]}
    given = ["--tokens", tokens, "--seed", seed, "--dtype", racer.dtype, "--device", "cpu", "--out", out, "--overwrite"]
    given += ["--eval-every", 10**6, "--save-every", 10**6]  # those on the way cost no seconds, but our patience
    call("train.py", *given, *racer.flags.split())
    seconds, before = 0.0, 0
    with open(out / "log.csv", newline="") as file:
        for row in csv.DictReader(file):
            seconds += (int(row["tokens"]) - before) / float(row["tokens_per_second"])
            before = int(row["tokens"])
    module, corpus = checkpoint.load(out).eval(), get_corpus()
    context = min(256, module.config.max_position_embeddings)
    loss, at_64 = (evaluate(lambda x, y: module(x, y)[1], corpus, T) for T in (context, CONTEXT))
    return {"seconds": seconds, "tokens": before, "loss": loss, "loss_at_64": at_64}


def read(table):
    """The table as {racer: {(seconds asked, round): row}}."""
    racers = {}
    if table.exists():
        with open(table, newline="") as file:
            for row in csv.DictReader(file):
                row = {name: kind(row[name]) for name, kind in COLUMNS.items()}
                racer = Racer(*(row[name] for name in Racer._fields))
                racers.setdefault(racer, {})[row["seconds_asked"], row["round"]] = row
    return racers


def run(table, racer, asked, r, out):
    """Trains for `asked` seconds in round r and adds the row to the table, unless it is there."""
    rows = read(table).get(racer, {})
    if (asked, r) in rows:
        return
    timed = list(rows.values()) or [train(racer, PROBE, r, out / "probe")]
    tokens = max(1, round(asked * statistics.median(row["tokens"] / row["seconds"] for row in timed)))
    result = train(racer, tokens, r, out / f"{racer.dtype}-{asked:g}-{r}")
    result = {name: round(value, 4) for name, value in result.items()}
    new = not table.exists()
    with open(table, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow({"round": r, "seed": r, **racer._asdict(), "seconds_asked": asked, **result})
    shown = "  ".join(f"{name} {value}" for name, value in result.items())
    print(f"round {r}, {asked:g} s, {' '.join(racer[:3])}:  {shown}", flush=True)


def cell(values, form=".3f"):
    spread = f" ± {statistics.stdev(values):{form.strip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}" if values else ""


def seconds_to(goal, points):
    """When losses [(seconds, loss)] come down to `goal`, linearly in log seconds between two of them; nan outside."""
    for (a, loss_a), (b, loss_b) in zip(points, points[1:]):
        if loss_b <= goal < loss_a:
            return a * (b / a) ** ((loss_a - goal) / (loss_a - loss_b))
    return math.nan


def show(table):
    racers = read(table)
    for racer, ours in racers.items():
        if racer.who == "nanoGPT":
            continue
        theirs = racers.get(Racer("nanoGPT", "float32", "", racer.threads), {})
        print(f"\nregrow in {racer.dtype}, flags: {racer.flags or 'none'}; threads: {racer.threads}")
        print("validation loss, nats a byte, mean ± deviation; a difference below 0: regrow is ahead\n")
        print("| seconds | nanoGPT | regrow | difference | regrow in windows of 64 | difference | seconds taken |")
        print("|---|---|---|---|---|---|---|")
        for asked in sorted({asked for asked, _ in [*ours, *theirs]}):
            a, b = ([rows[key] for key in sorted(rows) if key[0] == asked] for rows in (theirs, ours))
            pairs = [(theirs[key], ours[key]) for key in theirs.keys() & ours.keys() if key[0] == asked]
            cells = [f"{asked:g}", cell([row["loss"] for row in a])]
            for what in ("loss", "loss_at_64"):
                cells += [cell([row[what] for row in b]), cell([o[what] - t["loss"] for t, o in pairs], "+.3f")]
            taken = (cell([row["seconds"] for row in rows], ".1f") for rows in (a, b))
            print(f"| {' | '.join(cells)} | {', '.join(filter(None, taken))} |")
        if theirs:
            goal, times = min((asked for asked, _ in theirs), key=lambda asked: abs(asked - 100)), []
            for (asked, r), row in theirs.items():
                if asked == goal:
                    points = sorted((mine["seconds"], mine["loss"]) for mine in ours.values() if mine["round"] == r)
                    times.append(seconds_to(row["loss"], points))
            known = [t for t in times if not math.isnan(t)]
            print(f"\nregrow has nanoGPT's loss of {goal:g} s after {cell(known, '.1f') or '?'} s", end="")
            print(f" (rounds: {len(known)}; not within what it ran: {len(times) - len(known)})")


def main():
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", default="run", choices=("run", "show"), help="train what is missing and show, or show alone")
    add("--seconds", type=float, nargs="+", default=[30, 60, 100, 200], help="of both (default: 30 60 100 200)")
    add("--alone", type=float, nargs="*", default=[15, 20], help="seconds of ours without nanoGPT (default: 15 20)")
    add("--dtype", nargs="+", default=["auto"], choices=("auto", "float32", "bfloat16"), help="of ours (default: auto)")
    add("--rounds", type=int, default=3, help="repetitions, with seeds from 1 (default: %(default)s)")
    add("--table", type=Path, default=ROOT / "experiments/race.csv", help="where rows go (default: %(default)s)")
    add("--out", type=Path, help="folder that keeps the runs of ours (default: they are thrown away)")
    args, flags = parser.parse_args(given[:cut]), " ".join(given[cut + 1 :])
    auto = "bfloat16" if horizon.fast_bf16(torch.device("cpu")) else "float32"  # as train.py decides
    dtypes = dict.fromkeys(auto if dtype == "auto" else dtype for dtype in args.dtype)
    ours = [Racer("regrow", dtype, flags, torch.get_num_threads()) for dtype in dtypes]
    racers = [Racer("nanoGPT", "float32", "", torch.get_num_threads()), *ours]
    with tempfile.TemporaryDirectory() as temporary:
        for r in range(1, args.rounds + 1) if args.what == "run" else ():
            for asked in sorted({*args.seconds, *args.alone}):
                for racer in racers if asked in args.seconds else ours:
                    run(args.table, racer, asked, r, args.out or Path(temporary))
            racers = racers[1:] + racers[:1]  # another one goes first
    show(args.table)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
