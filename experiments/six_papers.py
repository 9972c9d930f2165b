"""One figure of the six papers' findings, a panel each, from the committed tables.

    python experiments/six_papers.py       # writes experiments/six_papers.png
"""

import importlib

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
    figure, grid = plt.subplots(2, 3, figsize=(13.5, 7.6), layout="constrained")
    for axes, (name, question) in zip(grid.flat, QUESTIONS.items()):
        if rows := load(home_of(name)):
            importlib.import_module(name).panel(axes, select(rows, optimizer="muon"))
        if axes.get_xscale() == "log" and name != "granularity":
            log_ticks(axes.xaxis)
        axes.set_title(f"{name}: {question}", fontsize=11)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
