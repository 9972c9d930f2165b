"""Does a mixture of experts pay at a size that a laptop trains? Paired runs: same text, same shared initial weights.

    python experiments/moe_table.py run --seeds 1 2 3      # about an hour on one core; a second call goes on
    python experiments/moe_table.py show                   # the table, from moe_table.csv and moe_speed.csv

E 8 with K 1 (softmax-topk) and K 2 at G 1, 2 and 4, against dense models of the same N and of the same active width
as K 2, all with the default shape, batch, rate and schedule. A mixture is trained for T tokens, a dense one for T,
2 T and 4 T (one trunk, a branch for each budget), so that its loss at the tokens that the mixture's FLOPs or seconds
would buy is read off between them, linearly in log tokens. Seconds are those of forward and backward on one thread in
processor time, the shapes in turn: a shared machine's wall clock is no instrument.
"""

import argparse
import csv
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import model

T = 1_503_232  # tokens: 367 steps of 4,096
TABLE, SPEED = ROOT / "experiments/moe_table.csv", ROOT / "experiments/moe_speed.csv"
DENSE = {"dense, N": "", "dense, active width of K 2": "--intermediate-size 768"}
MIXTURES = {
    "E 8 K 1 G 1, softmax-topk": "--experts 8 --top-k 1 --router softmax-topk",
    "E 8 K 2 G 1": "--experts 8 --top-k 2",
    "E 8 K 2 G 2": "--experts 8 --top-k 2 --granularity 2",
    "E 8 K 2 G 4": "--experts 8 --top-k 2 --granularity 4",
}


def train(out, *flags):
    if not (out / "loss.png").exists():  # the last file of a run
        flags = [*flags, "--out", str(out), "--overwrite", "--eval-every", "1000000", "--save-every", "1000000"]
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = list(csv.DictReader(open(out / "eval.csv")))
    return float(rows[-1]["python_loss"]), float(rows[-1]["flops"])


def run(seeds, out):
    rows = []
    for seed in seeds:
        for name, flags in (DENSE | MIXTURES).items():
            base = out / f"{name}-{seed}".replace(" ", "_")
            common = [*flags.split(), "--seed", str(seed), "--warmup", "8"]
            if name in MIXTURES:
                results = [(T, *train(base, *common, "--tokens", str(T)))]
            else:  # constant to three quarters of each budget, then a branch decays over the last quarter
                stops = [round(T * n / 4096 * 0.75) for n in (1, 2, 4)]
                at = ",".join(str(s * 4096) for s in stops)
                trunk = ["--tokens", str(stops[-1] * 4096), "--schedule", "constant", "--save-at", at]
                _, flops = train(base / "trunk", *common, *trunk)
                results = []
                for n, stop in zip((1, 2, 4), stops):
                    rest = n * T - stop * 4096
                    branch = ["--branch", str(base / f"trunk/step-{stop}"), "--tokens", str(rest)]
                    loss, more = train(base / f"branch-{n}", *branch)
                    results.append((n * T, loss, flops * stop / stops[-1] + more))
            for tokens, loss, flops in results:
                rows.append({"model": name, "seed": seed, "tokens": tokens, "flops": f"{flops:.6g}", "loss": loss})
                print(rows[-1], flush=True)
    known = list(csv.DictReader(open(TABLE))) if TABLE.exists() else []
    rows += [r for r in known if int(r["seed"]) not in seeds]
    with open(TABLE, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: (r["model"], int(r["seed"]), int(r["tokens"]))))


def speed(rounds=9):
    """Processor seconds a step of 4,096 tokens on one thread, the shapes in turn."""
    import train as trainer

    torch.set_num_threads(1)
    steps = {}
    for name, flags in (DENSE | MIXTURES).items():
        parser, args, given = trainer.read_flags(flags.split())
        module = model.init_weights(model.Transformer(trainer.settle(args, given, 1)[1]), 1)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
        ids = torch.randint(256, (16, 256))

        def step(module=module, optimizer=optimizer, ids=ids):
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                _, loss, aux = module(ids, ids)
            (loss + 0.01 * aux["balance_loss"] if aux else loss).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return time.process_time() - start

        steps[name] = step
    seconds = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            taken = step()
            if i > 1:
                seconds[name].append(taken)
    with open(SPEED, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["model", "seconds_a_step", "lowest", "highest"])
        for name, s in seconds.items():
            writer.writerow([name, f"{statistics.median(s):.4f}", f"{min(s):.4f}", f"{max(s):.4f}"])


def show():
    rows = list(csv.DictReader(open(TABLE)))
    seconds = {r["model"]: float(r["seconds_a_step"]) for r in csv.DictReader(open(SPEED))}
    curve = {}
    for r in rows:
        curve.setdefault((r["model"], r["seed"]), []).append((int(r["tokens"]), float(r["loss"]), float(r["flops"])))
    for points in curve.values():
        points.sort()
    seeds = sorted({r["seed"] for r in rows})

    def at(name, seed, tokens):
        points = curve[name, seed]
        for (a, la, _), (b, lb, _) in zip(points, points[1:]):
            if a <= tokens <= b:
                return la + (lb - la) * math.log(tokens / a) / math.log(b / a)
        return points[0][1] if tokens == points[0][0] else math.nan

    def cell(differences):
        if any(math.isnan(d) for d in differences):
            return "outside"
        return f"{statistics.mean(differences):+.3f} ± {statistics.stdev(differences):.3f}"

    print(f"| model, {T / 1e6:.1f} M tokens, seeds {', '.join(seeds)} | loss | against | equal tokens | equal FLOPs |"
          " equal seconds |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    for name in DENSE | MIXTURES:
        mine = {s: curve[name, s][0] for s in seeds}
        loss = f"{statistics.mean(l for _, l, _ in mine.values()):.3f}"
        for base in DENSE if name in MIXTURES else list(DENSE)[:1] if name != "dense, N" else []:
            per_token = {s: curve[base, s][0][2] / T for s in seeds}
            cells = [
                cell([mine[s][1] - at(base, s, T) for s in seeds]),
                cell([mine[s][1] - at(base, s, mine[s][2] / per_token[s]) for s in seeds]),
                cell([mine[s][1] - at(base, s, T * seconds[name] / seconds[base]) for s in seeds]),
            ]
            print(f"| {name} | {loss} | {base} | {' | '.join(cells)} |")
            loss = ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "speed", "show"), help="train, time the steps, or print the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds to train (default: 1 2 3)")
    parser.add_argument("--out", type=Path, default=Path("out/moe_table"), help="folder of runs (default: %(default)s)")
    args = parser.parse_args()
    if args.what == "run":
        run(args.seeds, args.out)
    elif args.what == "speed":
        speed()
    else:
        show()


if __name__ == "__main__":
    main()
