"""What the experiments share: a run, a sweep of the rate, a step to be timed, a ladder read between its budgets.

A ladder is one trunk at a constant rate, with a branch for each budget. The last quarter of a budget decays. The losses
are those that separate runs would have, for less. A run that is whole is not run again, so a second call goes on.

SCALE=cpu is the default: text that every machine has. SCALE=gpu is larger, SCALE=tiny tries a script out in a minute or
two. papers.py builds on this file, for the six papers.
"""

import argparse
import csv
import math
import os
import statistics
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
M = 1_000_000
SCALE = os.environ.get("SCALE", "cpu")
if SCALE not in ("tiny", "cpu", "gpu"):
    sys.exit(f"SCALE is {SCALE} (tiny, cpu or gpu)")


def pick(tiny, cpu, gpu):
    """The value for the SCALE of the environment."""
    return {"tiny": tiny, "cpu": cpu, "gpu": gpu}[SCALE]


STEP = pick(512, 2048, 32768)  # tokens
WARMUP = pick(2, 16, 50)  # steps
RHYTHM = ("--eval-every", "1000000", "--save-every", "1000000")
SETTING = ("--batch-tokens", str(STEP), *RHYTHM)


# ---- one run, one sweep -------------------------------------------------------------------------------------------


def call(command):
    """Runs a Python script of ours on one thread. RuntimeError with what it said, if it fails."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed\n{done.stdout[-300:]}{done.stderr[-2000:]}")


def train(out, *flags, script=(ROOT / "train.py",)):
    """(validation loss, FLOPs) of the run in `out`, run now if it is not there. The loss is that of the first corpus of
    --data. script: train.py, or another, and what comes before the flags."""
    if not (out / "loss.png").exists():  # the last file of a run
        call([*script, *flags, "--out", out, "--overwrite"])
    last = list(csv.DictReader(open(out / "eval.csv")))[-1]
    return float(next(last[name] for name in last if name.endswith("_loss"))), float(last["flops"])


def grid(table, out, rows, flags, script=lambda row: (ROOT / "train.py",)):
    """Trains one run for each of `rows`, {column: value}, and adds it to the CSV `table` with its loss and FLOPs. A row
    that the table holds is not run again. A rate at which the loss is no number any more is a result, too: infinite.
    flags(row): those of train.py; script(row): another script in its place."""
    for row in rows:
        row = {column: str(value) for column, value in row.items()}
        if any(row.items() <= other.items() for other in read_rows(table)):
            continue
        try:
            folder = out / "_".join(row.values()).replace(" ", "")
            loss, flops = train(folder, *SETTING, *flags(row), script=script(row))
        except RuntimeError as failed:
            if "stopped. Last save" not in str(failed):
                raise
            loss, flops = math.inf, math.nan
        append(table, row | {"loss": loss, "flops": f"{flops:.6g}"})
        print(*row.values(), loss, flush=True)


def read_rows(path):
    """The rows of a CSV as {column: text}; none if there is no file."""
    return list(csv.DictReader(open(path, newline=""))) if path.exists() else []


def append(path, row):
    """One more line at the end of a CSV, in one write: two processes may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), open(path, "x", newline="") as f:
        csv.writer(f).writerow(row)
    with open(path, "a", newline="") as f:
        csv.writer(f).writerow(row.values())


# ---- a step, to be timed ---------------------------------------------------------------------------------------------


def stepper(flags, device="cpu"):
    """(a function that makes one whole step of train.py with these flags, on random tokens; their settings)."""
    sys.path.insert(0, str(ROOT))
    import torch

    import cpu
    import horizon
    import settings
    import train as trainer
    from ranks import Ranks

    ranks = Ranks()
    device = ranks.join(torch.device(device), fsdp=False)
    cpu.keep_memory()
    start = settings.settle(*settings.read_flags(settings.get_parser(), [*flags, "--out", "out/not-made"]), 1)
    s, module = start.settings, trainer.build(start, ranks)
    s.dtype = "bfloat16" if horizon.fast_bf16(device) else "float32"
    horizon.complete(s, start.config, module.num_parameters(), 1, device, 1)
    if device.type == "cuda":
        trainer.compile_blocks(module)
    optimizers = trainer.get_optimizers(dict(module.named_parameters()), s, {}, ranks)
    ids = torch.randint(start.config.vocab_size, (s.batch_tokens // s.context, s.context), device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step():
        for x in ids.split(s.micro_batch):
            with torch.autocast(device.type, torch.bfloat16) if s.dtype == "bfloat16" else nullcontext():
                _, loss, aux = module(x, x)
            (loss + s.balance_coef * aux["balance_loss"] if aux else loss).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), s.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        wait()

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


# ---- numbers --------------------------------------------------------------------------------------------------------


def at(points, flops):
    """The loss of a ladder at so many FLOPs, between two of its points linearly in log FLOPs; nan outside."""
    for (_, la, a), (_, lb, b) in zip(points, points[1:]):
        if a * 0.999 <= flops <= b * 1.001:
            return la + (lb - la) * math.log(flops / a) / math.log(b / a)
    return math.nan


def reach(points, loss):
    """The other way round: the FLOPs at which a ladder has that loss; nan outside."""
    for (_, la, a), (_, lb, b) in zip(points, points[1:]):
        if lb <= loss <= la:
            return a * (b / a) ** ((loss - la) / (lb - la) if lb < la else 0)
    return math.nan


def cell(values, sign="+"):
    if not values or any(math.isnan(v) for v in values):
        return "outside" if values else "missing"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


# ---- the command line -----------------------------------------------------------------------------------------------


def get_parser(doc, words):
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=words, help="run trains; the others as above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds to train (default: 1 2 3)")
    return parser


def main(doc, run, **others):
    """The command line of a table: `run` trains one seed, run(seed, out); each of `others` is a word that calls it."""
    parser = get_parser(doc, ("run", *others))
    parser.add_argument("--out", type=Path, default=Path("out/tables"), help="folder of runs (default: %(default)s)")
    args = parser.parse_args()
    if args.what != "run":
        return others[args.what]()
    for seed in args.seeds:
        run(seed, args.out)
