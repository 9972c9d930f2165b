"""Continued training of an upcycled model, against the dense model trained on and against a mixture from scratch.

    python experiments/upcycle_table.py run --seeds 1 2 3      # 40 minutes on one core; a second call goes on
    python experiments/upcycle_table.py show                   # the tables and upcycling.png, from upcycle_table.csv

In the setting of ladder.py: a dense model sees D1 = 3 million tokens at a constant rate. From there it is trained on
for D2 tokens more, as it is or upcycled to 8x2 (`--init`: new optimizer, new warmup, the text goes on); and an 8x2
mixture starts from nothing. Every D2 has its own decay. Differences are paired by seed: same text, same first weights.
"""

from ladder import ADAMW, ROOT, SHAPE, STEP, M, at, cell, dense, ladder, main, read, write

TABLE = ROOT / "experiments/upcycle_table.csv"
D1 = 1465 * STEP
ON, UP, SCRATCH = "dense, trained on", "upcycled to 8x2", "8x2 from scratch"


def run(seed, out):
    first = dense(out, seed)
    before = first[0][2] / first[0][0] * D1  # FLOPs of the dense model so far
    parent = ["--init", out / f"dense-{seed}/trunk/step-{D1 // STEP}", *ADAMW, "--seed", seed]
    mixture = [*SHAPE, *ADAMW, "--experts", 8, "--top-k", 2, "--seed", seed]
    budgets = (M // 2, M, 2 * M)
    on = ladder(out / f"on-{seed}", (*budgets, 4 * M), *parent)
    up = ladder(out / f"up-{seed}", budgets, *parent, "--upcycle", "8x2")
    grown = {name: [(n, loss, before + C) for n, loss, C in points] for name, points in ((ON, on), (UP, up))}
    write(TABLE, seed, {**grown, SCRATCH: ladder(out / f"scratch-{seed}", (M, 2 * M, 4 * M), *mixture)})


def show():
    curves, seeds = read(TABLE)
    print(f"| D2, D1 = {D1 / M:.1f} M, seeds {', '.join(seeds)} | {ON} | {UP} | {SCRATCH} |"
          " upcycled - dense, equal tokens | equal FLOPs | upcycled - scratch, equal tokens | equal FLOPs, with D1 |")
    print("|" + "---|" * 8)
    for i, (tokens, _, _) in enumerate(curves[UP, seeds[0]]):
        up = [curves[UP, s][i] for s in seeds]
        on, scratch = ([curves[name, s] for s in seeds] for name in (ON, SCRATCH))
        same = [{n: loss for n, loss, _ in points}.get(tokens, float("nan")) for points in scratch]
        cells = [
            cell([points[i][1] for points in on], ""), cell([p[1] for p in up], ""), cell(same, ""),
            cell([p[1] - points[i][1] for p, points in zip(up, on)]),
            cell([p[1] - at(points, p[2]) for p, points in zip(up, on)]),
            cell([p[1] - loss for p, loss in zip(up, same)]),
            cell([p[1] - at(points, p[2]) for p, points in zip(up, scratch)]),
        ]  # fmt: skip
        print(f"| {tokens / M} M | {' | '.join(cells)} |")
    plot(curves, seeds)


def plot(curves, seeds):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    labels = ("tokens since the start of this training", "training FLOPs, the dense model's included")
    for panel, x, label in zip(axes, (0, 2), labels):
        for i, name in enumerate((ON, UP, SCRATCH)):
            for seed in seeds:
                points = curves[name, seed]
                named = name if seed == seeds[0] else None
                panel.plot([p[x] for p in points], [p[1] for p in points], "o-", color=f"C{i}", ms=3, lw=1, label=named)
        panel.set(xlabel=label, xscale="log")
        ticks = (5e5, 1e6, 2e6, 4e6) if x == 0 else (2.5e12, 5e12, 1e13)
        panel.set_xticks(ticks, [f"{t / 1e6:g} M" if x == 0 else f"{t:g}" for t in ticks])
        panel.minorticks_off()
    axes[0].set_ylabel("validation loss, nats a byte")
    axes[1].legend(frameon=False)
    figure.savefig(ROOT / "experiments/upcycling.png", dpi=150)


if __name__ == "__main__":
    main(__doc__, run, show=show)
