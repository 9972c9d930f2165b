"""One figure of the six papers' findings, a panel each, from the committed tables.

    python experiments/six_papers.py       # writes experiments/six_papers.png
"""

import importlib
import math

from ladder import ROOT
from papers import home_of
from verdict import load, select

from plots import log_ticks, plt

PICTURE = ROOT / "experiments/six_papers.png"
QUESTIONS = {
    "dense": "parameters or tokens?",
    "granularity": "how fine should experts be?",
    "upcycling": "dense to a mixture: when?",
    "recipes": "dense to a mixture: how?",
    "stacking": "which growth operator?",
    "continual": "how much of the old text?",
}


def main():
    tables = {name: rows for name in QUESTIONS if (rows := load(home_of(name)))}  # of the scripts that were run
    down = math.ceil(len(tables) / 3)
    figure, grid = plt.subplots(down, 3, figsize=(13.5, 3.8 * down), layout="constrained", squeeze=False)
    for axes, (name, rows) in zip(grid.flat, tables.items()):
        importlib.import_module(name).panel(axes, select(rows, optimizer="muon"))
        if axes.get_xscale() == "log" and name != "granularity":
            log_ticks(axes.xaxis)
        axes.set_title(f"{name}: {QUESTIONS[name]}", fontsize=11)
    for axes in grid.flat[len(tables) :]:
        axes.axis("off")
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
