"""
Our fit against the Python package `chinchilla`: the same runs, the same objective, the same 4,500 starts.

    pip install chinchilla
    python experiments/bench_laws.py RUNS.csv [--repeat 5] > experiments/bench_laws.csv

RUNS.csv is the table that Epoch AI read off Hoffmann's figure (github.com/epoch-research/analyzing-chinchilla,
data/svg_extracted_data.csv, not ours to copy). As in its paper the 5 highest losses are dropped: 240 runs. Both end in
the sum of Huber (delta 1e-3) on the log loss, which is computed here, by one function, from the five coefficients.
"""

import argparse
import contextlib
import csv
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import descent  # noqa: E402
import fitting  # noqa: E402
import laws  # noqa: E402


def objective(table, c):
    """Sum of Huber on the log loss of E, A, B, alpha, beta: the judge of both."""
    names = ("E", "A", "B", "alpha", "beta")
    r = np.log(descent.evaluate(laws.chinchilla, {n: float(c[n]) for n in names}, **table)) - np.log(table["L"])
    return descent.huber(r).sum()


def theirs(table, folder):
    """The package's fit: coefficients and seconds, its processes on all cores."""
    from chinchilla import Chinchilla
    from chinchilla._metrics import log_huber

    with open(f"{folder}/df.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["C", "N", "D", "loss"])
        writer.writerows(zip(6 * table["N"] * table["D"], table["N"], table["D"], table["L"]))
    grid = {
        "e": [-1, -0.5, 0, 0.5, 1],
        "a": list(range(0, 30, 5)),
        "b": list(range(0, 30, 5)),
        "alpha": [0, 0.5, 1, 1.5, 2],
        "beta": [0, 0.5, 1, 1.5, 2],
    }
    loss_fn = functools.partial(log_huber, delta=descent.HUBER)
    fitter = Chinchilla(folder, param_grid=grid, loss_fn=loss_fn, log_level=40)
    fitter.visualizer.optim = lambda *_, **__: None  # its plot is not part of the fit
    start = time.perf_counter()
    fitter.fit()
    return {n: getattr(fitter, n) for n in ("E", "A", "B", "alpha", "beta")}, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="Epoch AI's CSV")
    parser.add_argument("--repeat", type=int, default=5, help="times that the fast things are timed (default: 5)")
    args = parser.parse_args()
    with open(args.runs, newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda r: float(r["loss"]))[:-5]
    N, C, L = (np.array([float(r[k]) for r in rows]) for k in ("Model Size", "Training FLOP", "loss"))
    table = {"N": N, "D": C / (6 * N), "L": L}
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow("what objective seconds E A B alpha beta".split())

    with tempfile.TemporaryDirectory() as folder:
        ours = []  # the same work as the package does: from the table to five coefficients
        for _ in range(args.repeat):
            start = time.perf_counter()
            best = fitting.solve(laws.chinchilla, table)
            ours.append(time.perf_counter() - start)
        c = dict(zip(best.names, best.values(best.theta)))
        out.writerow(
            [
                "fitting.solve, median",
                f"{objective(table, c):.11f}",
                f"{np.median(ours):.3f}",
                *(f"{c[n]:.6g}" for n in ("E", "A", "B", "alpha", "beta")),
            ]
        )
        sys.stdout.flush()

        path = f"{folder}/runs.csv"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*(map(repr, map(float, v)) for v in table.values())))
        for what, flags in (("laws.py fit", []), ("laws.py fit --bootstrap 1000", ["--bootstrap", "1000"])):
            seconds = []
            for _ in range(args.repeat):
                start = time.perf_counter()
                command = [sys.executable, ROOT / "laws.py", "fit", "chinchilla", path, "--json", *flags]
                report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                seconds.append(time.perf_counter() - start)
            c = report["coefficients"]
            out.writerow(
                [
                    f"{what}, whole process, median",
                    f"{objective(table, c):.11f}",
                    f"{np.median(seconds):.3f}",
                    *(f"{v:.6g}" for v in c.values()),
                ]
            )
        for end in (0, 1):
            out.writerow(
                [
                    ("lower", "upper")[end] + " end of 95 %",
                    "",
                    "",
                    *(f"{i[end]:.6g}" for i in report["intervals"].values()),
                ]
            )
        published = {
            "E": (1.769, 1.871),
            "A": (285.2, 743.6),
            "B": (1042.4, 5810.3),
            "alpha": (0.317, 0.373),
            "beta": (0.331, 0.415),
        }
        for end in (0, 1):
            out.writerow([("lower", "upper")[end] + " end, published", "", "", *(i[end] for i in published.values())])
        sys.stdout.flush()

        with contextlib.redirect_stdout(sys.stderr):
            try:
                c, seconds = theirs(table, folder)
            except ImportError:
                sys.exit("the package chinchilla is not installed: pip install chinchilla")
        out.writerow(
            [
                "chinchilla 0.2.0",
                f"{objective(table, c):.11f}",
                f"{seconds:.3f}",
                *(f"{float(v):.6g}" for v in c.values()),
            ]
        )
        out.writerow([f"times faster on {os.cpu_count()} cores", "", f"{seconds / np.median(ours):.1f}", *[""] * 5])


if __name__ == "__main__":
    main()
