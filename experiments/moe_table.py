"""Does a mixture of experts pay at a size that a laptop trains? Paired runs: same text, same shared initial weights.

    python experiments/moe_table.py run --seeds 1 2 3      # about an hour on one core; a second call goes on
    python experiments/moe_table.py speed                  # a minute
    python experiments/moe_table.py show                   # the table, from moe_table.csv and moe_speed.csv

E 8 with K 1 (softmax-topk) and K 2 at G 1, 2 and 4, against dense models of the same N and of the same active width
as K 2, in the setting of ladder.py. A mixture is trained for T = 2 million tokens, a dense one for T, 2 T and 4 T, so
that its loss at the FLOPs or seconds of the mixture is read off between them, linearly in the logarithm. Seconds are
those of a step on one thread in processor time, the shapes in turn: a shared machine's wall clock is no instrument.
"""

import csv
import statistics
import sys
import time

import torch
from ladder import ADAMW, ROOT, SETTING, SHAPE, M, at, cell, dense, folder, main, read, train, write

sys.path.insert(0, str(ROOT))
import model

T = 2 * M
TABLE, SPEED = ROOT / "experiments/moe_table.csv", ROOT / "experiments/moe_speed.csv"
DENSE = {"dense, N": "", "dense, active width of K 2": "--intermediate-size 384"}
MIXTURES = {
    "E 8 K 1 G 1, softmax-topk": "--experts 8 --top-k 1 --router softmax-topk",
    "E 8 K 2 G 1": "--experts 8 --top-k 2",
    "E 8 K 2 G 2": "--experts 8 --top-k 2 --granularity 2",
    "E 8 K 2 G 4": "--experts 8 --top-k 2 --granularity 4",
}


def run(seed, out):
    ladders = {}
    for name, flags in DENSE.items():
        ladders[name] = dense(out if not flags else out / "active", seed, *flags.split())
    for name, flags in MIXTURES.items():
        given = [*SETTING, *SHAPE, *ADAMW, "--seed", seed, "--warmup", 16, "--tokens", T, *flags.split()]
        ladders[name] = [(T, *train(folder(out, name, seed), *given))]
    write(TABLE, seed, ladders)


def speed(rounds=25):
    """Processor seconds a step of 2,048 tokens on one thread, the shapes in turn."""
    import settings

    torch.set_num_threads(1)
    steps = {}
    for name, flags in (DENSE | MIXTURES).items():
        start = settings.settle(*settings.read_flags(settings.get_parser(), [*SHAPE, *flags.split()]), 1)
        module = model.init_weights(model.Transformer(start.config), 1)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
        ids = torch.randint(256, (8, 256))

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
    curves, seeds = read(TABLE)
    seconds = {r["model"]: float(r["seconds_a_step"]) for r in csv.DictReader(open(SPEED))}
    print(f"| {T // M} M tokens, seeds {', '.join(seeds)} | loss | seconds | against | equal tokens | equal FLOPs |"
          " equal seconds |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for name in DENSE | MIXTURES:
        mine = [curves[name, seed][0] for seed in seeds]
        row = f"{name} | {cell([m[1] for m in mine], '')} | {seconds[name] / seconds['dense, N']:.2f}"
        if name == "dense, N":
            print(f"| {row} | | | | |")
        for base in [b for b in DENSE if b != name and name != "dense, N"]:
            theirs, slower = [curves[base, seed] for seed in seeds], seconds[name] / seconds[base]
            cells = [
                cell([m[1] - at(t, f) for m, t, f in zip(mine, theirs, flops)])
                for flops in ([t[0][2] for t in theirs], [m[2] for m in mine], [t[0][2] * slower for t in theirs])
            ]
            print(f"| {row} | {base} | {' | '.join(cells)} |")
            row = " | | "


if __name__ == "__main__":
    main(__doc__, run, speed=speed, show=show)
