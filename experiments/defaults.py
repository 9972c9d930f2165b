"""What a first run should be: the validation loss that each shape, batch and rate reaches in the same processor time.

    python experiments/defaults.py --seconds 270 --out out/defaults      # one thread; the table goes to defaults.csv

Each row is probed for its speed (processor seconds a step on one thread, evaluation left out), then trained for as many
tokens as the budget buys, so that the schedule knows its horizon. One seed: differences below 0.02 nats mean nothing.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROWS = {  # name: flags
    "start: 3 x 128, 4 heads, 4096 tokens, 3e-3": "",
    "no QK-norm": "--no-qk-norm",
    "2 heads": "--num-attention-heads 2",
    "2 heads, no QK-norm": "--num-attention-heads 2 --no-qk-norm",
    "4 layers, 2 heads": "--num-attention-heads 2 --num-hidden-layers 4",
    "3 x 192, 3 heads": "--hidden-size 192 --num-attention-heads 3",
    "2 x 192, 3 heads": "--hidden-size 192 --num-attention-heads 3 --num-hidden-layers 2",
    "3 x 96, 2 heads": "--hidden-size 96 --num-attention-heads 2",
    "2 heads, 2048 tokens": "--num-attention-heads 2 --batch-tokens 2048",
    "2 heads, 8192 tokens": "--num-attention-heads 2 --batch-tokens 8192",
    "2 heads, 6e-3": "--num-attention-heads 2 --lr 6e-3",
    "2 heads, 1e-2": "--num-attention-heads 2 --lr 1e-2",
}

PROBE = """
import sys, time, torch
sys.path.insert(0, {root!r})
import model, settings
torch.set_num_threads(1)
start = settings.settle(*settings.read_flags(settings.get_parser(), {flags!r}), 1)
module, args = model.init_weights(model.Transformer(start.config), 1), start.settings
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
ids = torch.randint(256, (args.batch_tokens // args.context, args.context))
best = 1e9
for i in range(8):
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(ids, ids)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    best = min(best, time.process_time() - start)
print(args.batch_tokens / best)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=270, help="processor seconds a row (default: %(default)s)")
    parser.add_argument("--out", default="out/defaults", help="folder of the runs (default: %(default)s)")
    args = parser.parse_args()
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    table = HERE / "defaults.csv"
    done = {row["row"] for row in csv.DictReader(open(table))} if table.exists() else set()
    for i, (name, flags) in enumerate(ROWS.items()):
        if name in done:
            continue
        probe = PROBE.format(root=str(HERE.parent), flags=flags.split())
        probed = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True, check=True)
        speed = float(probed.stdout)
        tokens = round(speed * args.seconds, -5)
        out, start = Path(args.out) / str(i), time.time()
        command = [sys.executable, HERE.parent / "train.py", *flags.split(), "--tokens", str(int(tokens)), "--out", out]
        command += ["--overwrite", "--eval-every", "1000000", "--save-every", "1000000"]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        loss = list(csv.DictReader(open(out / "eval.csv")))[-1]["python_loss"]
        new = not table.exists()
        with open(table, "a", newline="") as f:
            writer = csv.writer(f)
            if new:
                writer.writerow(["row", "flags", "tokens_per_second_1_thread", "tokens", "loss", "wall_seconds"])
            writer.writerow([name, flags, round(speed), int(tokens), loss, round(time.time() - start)])
        print(name, round(speed), int(tokens), loss, flush=True)


if __name__ == "__main__":
    main()
