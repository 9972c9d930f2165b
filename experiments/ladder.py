"""What the table experiments share: runs of one setting for several budgets, each with a decay, and paired cells.

Setting: 3 layers of 64, bytes of Python, 2,048 tokens a step, one thread. A ladder is one trunk at a
constant rate with a branch for each budget, whose last quarter decays: the losses that separate runs would have, for
less. A run that is whole is not run again, so a second call goes on, and the tables share the dense trunk.
"""

import argparse
import csv
import math
import os
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import settings
import train as trainer
from ranks import Ranks

STEP = 2048  # tokens
SETTING = ("--batch-tokens", str(STEP), "--eval-every", "1000000", "--save-every", "1000000")
SHAPE = ("--hidden-size", "64", "--num-hidden-layers", "3", "--num-attention-heads", "4")
ADAMW = ("--optimizer", "adamw", "--lr", "0.003")  # with which moe_table, upcycle_table and grow_table were measured
M = 1_000_000


def train(out, *flags, script=(ROOT / "train.py",)):
    """(validation loss, FLOPs) of the run in `out`, run now if it is not there. script: that, and what comes first."""
    if not (out / "loss.png").exists():  # the last file of a run
        command = [sys.executable, *map(str, (*script, *flags)), "--out", str(out), "--overwrite"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    last = list(csv.DictReader(open(out / "eval.csv")))[-1]
    return float(last["python_loss"]), float(last["flops"])


def ladder(out, budgets, *flags):
    """[(tokens, loss, FLOPs)] of the setting `flags` for each budget in tokens; the FLOPs are those of these runs."""
    stops = [round(tokens * 0.75 / STEP) for tokens in budgets]
    at = ",".join(str(stop * STEP) for stop in stops)
    trunk = ["--tokens", stops[-1] * STEP, "--schedule", "constant", "--save-at", at]
    _, flops = train(out / "trunk", *SETTING, *flags, "--warmup", 16, *trunk)
    points = []
    for tokens, stop in zip(budgets, stops):
        branch = ["--branch", out / f"trunk/step-{stop}", "--tokens", tokens - stop * STEP]
        loss, more = train(out / f"to-{tokens}", *SETTING[2:], *branch)
        points.append((tokens, loss, flops * stop / stops[-1] + more))
    return points


def dense(out, seed, *flags):
    """The dense ladder that all tables start from; its trunk holds snapshots at 1.5, 3 and 6 million tokens."""
    return ladder(out / f"dense-{seed}", (2 * M, 4 * M, 8 * M), *SHAPE, *ADAMW, "--seed", seed, *flags)


def at(points, flops):
    """The loss of a ladder at so many FLOPs, between two of its points linearly in log FLOPs; nan outside."""
    for (_, la, a), (_, lb, b) in zip(points, points[1:]):
        if a * 0.999 <= flops <= b * 1.001:
            return la + (lb - la) * math.log(flops / a) / math.log(b / a)
    return math.nan


def grid(table, out, rows, flags, script=lambda row: (ROOT / "train.py",)):
    """Trains one run for each of `rows`, {column: value}, and adds it to the CSV `table` with its loss and FLOPs. A row
    that the table holds is not run again. flags(row): those of train.py; script(row): another script in its place."""
    for row in rows:
        row = {column: str(value) for column, value in row.items()}
        known = list(csv.DictReader(open(table))) if table.exists() else []
        if any(row.items() <= other.items() for other in known):
            continue
        loss, flops = train(out / "_".join(row.values()).replace(" ", ""), *SETTING, *flags(row), script=script(row))
        with open(table, "a", newline="") as f:
            writer = csv.DictWriter(f, [*row, "loss", "flops"])
            if not known:
                writer.writeheader()
            writer.writerow(row | {"loss": loss, "flops": f"{flops:.6g}"})
        print(*row.values(), loss, flush=True)


def stepper(flags):
    """(a function that makes one whole step of train.py with these flags, on random tokens; their settings)."""
    ranks = Ranks()
    ranks.join(torch.device("cpu"), fsdp=False)
    given = [*flags, "--out", "out/not-made"]
    start = settings.settle(*settings.read_flags(settings.get_parser(), given), 1)
    s, module = start.settings, trainer.build(start, ranks)
    s.dtype = "bfloat16" if settings.fast_bf16(ranks.device) else "float32"
    settings.horizon(s, start.config, module.num_parameters(), 1, ranks.device, 1)
    optimizers = trainer.get_optimizers(dict(module.named_parameters()), s, {}, ranks)
    ids = torch.randint(start.config.vocab_size, (s.batch_tokens // s.context, s.context))

    def step():
        for x in ids.split(s.micro_batch):
            with torch.autocast("cpu", torch.bfloat16) if s.dtype == "bfloat16" else nullcontext():
                _, loss, aux = module(x, x)
            (loss + s.balance_coef * aux["balance_loss"] if aux else loss).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), s.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step, s


def in_turn(steps, rounds, clock):
    """{name: its times, in seconds of clock()} of the functions `steps` {name: function}, called in turn."""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 2):  # the first two do not count
        for name, step in steps.items():
            start = clock()
            step()
            if i > 1:
                seconds[name].append(clock() - start)
    return seconds


def cell(values, sign="+"):
    if any(math.isnan(v) for v in values):
        return "outside"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def folder(out, name, seed):
    return out / f"{name}-{seed}".replace(" ", "_").replace(",", "")


def write(path, seed, ladders):
    """Adds {model: ladder} of a seed to a CSV, in the place of its earlier rows, and prints what was added."""
    rows = []
    for name, points in ladders.items():
        for tokens, loss, flops in points:
            rows.append({"model": name, "seed": seed, "tokens": tokens, "flops": f"{flops:.6g}", "loss": loss})
            print(rows[-1], flush=True)
    known = [r for r in csv.DictReader(open(path)) if int(r["seed"]) != seed] if path.exists() else []
    rows = sorted([*known, *rows], key=lambda r: (r["model"], int(r["seed"]), int(r["tokens"])))
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read(path):
    """({(model, seed): [(tokens, loss, FLOPs)]}, seeds) of such a CSV."""
    curves = {}
    for r in csv.DictReader(open(path)):
        curves.setdefault((r["model"], r["seed"]), []).append((int(r["tokens"]), float(r["loss"]), float(r["flops"])))
    return curves, sorted({seed for _, seed in curves})


def main(doc, run, **others):
    """The command line of a table: `run` trains one seed, run(seed, out); each of `others` is a word that calls it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", *others), help="run trains; the others as above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds to train (default: 1 2 3)")
    parser.add_argument("--out", type=Path, default=Path("out/tables"), help="folder of runs (default: %(default)s)")
    args = parser.parse_args()
    if args.what != "run":
        return others[args.what]()
    for seed in args.seeds:
        run(seed, args.out)
