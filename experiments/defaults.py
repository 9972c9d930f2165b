"""What a first run should be: the validation loss that each shape, batch, rate and optimizer reaches in the same time.

    python experiments/defaults.py run [--seeds 1]      # a second call goes on
    python experiments/defaults.py show                 # the table, from defaults.csv

Each row is probed for its speed, processor seconds of a whole step on one thread. Then it is trained for as many tokens
as 200 of these seconds buy, so that the schedule knows its horizon. The first row is the default of before.
"""

import statistics
import time

import torch
from ladder import ROOT, append, cell, in_turn, main, read_rows, stepper, train

TABLE, SECONDS = ROOT / "experiments/defaults.csv", 200
BASE = "--num-hidden-layers 3 --num-attention-heads 2 --optimizer muon --lr 0.005 --batch-tokens 2048"
ROWS = {  # name: flags; of a flag that is given twice the second counts
    "AdamW, 3e-3, 4,096 tokens a step, 4 heads": BASE + " --optimizer adamw --lr 0.003 --batch-tokens 4096"
                                                        " --num-attention-heads 4",
    "AdamW, 2e-3": BASE + " --optimizer adamw --lr 0.002",
    "AdamW, 1.5e-3, 1,024 tokens a step": BASE + " --optimizer adamw --lr 0.0015 --batch-tokens 1024",
    "Muon, 5e-3": BASE,
    "Muon, 1,024 tokens a step": BASE + " --batch-tokens 1024",
    "Muon, 4 heads": BASE + " --num-attention-heads 4",
    "Muon, 3 x 192, 3.5e-3, 3 heads": BASE + " --hidden-size 192 --num-attention-heads 3 --lr 0.0035",
    "Muon, 2 x 192, 3.5e-3, 3 heads": BASE + " --hidden-size 192 --num-attention-heads 3 --lr 0.0035"
                                             " --num-hidden-layers 2",
    "Muon, 3 x 96, 7e-3": BASE + " --hidden-size 96 --lr 0.007",
}  # fmt: skip


def run(seed, out):
    torch.set_num_threads(1)
    for name, flags in ROWS.items():
        mine = [r for r in read_rows(TABLE) if (r["row"], r["flags"]) == (name, flags)]
        if str(seed) in [r["seed"] for r in mine]:
            continue
        if mine:
            tokens = int(mine[0]["tokens"])
        else:
            step, s = stepper(flags.split())
            a_step = statistics.median(in_turn({name: step}, 9, time.process_time)[name])
            tokens = round(SECONDS / a_step) * s.batch_tokens
        given = [*flags.split(), "--tokens", tokens, "--seed", seed, "--eval-every", 10**6, "--save-every", 10**6]
        loss, _ = train(out / "defaults" / f"{list(ROWS).index(name)}-{seed}", *given)
        append(TABLE, {"row": name, "flags": flags, "tokens": tokens, "seed": seed, "loss": loss})
        print(name, tokens, seed, loss, flush=True)


def show():
    rows = read_rows(TABLE)
    print(f"| {SECONDS} s on one thread | tokens | loss | seeds |\n|---|---|---|---|")
    for name in ROWS:
        if mine := [r for r in rows if r["row"] == name]:
            losses = [float(r["loss"]) for r in mine]
            print(f"| {name} | {int(mine[0]['tokens']) / 1e6:.2f} M | {cell(losses, '')} | {len(losses)} |")


if __name__ == "__main__":
    main(__doc__, run, show=show)
