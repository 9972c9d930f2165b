"""What the scripts share: how they leave while they are still loading, and what they say to a mistyped flag."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data
import grow
import train
import upcycle
from tables import Parser

ROOT = Path(__file__).parent.parent


SCRIPTS = ("train", "model", "upcycle", "grow", "ligo", "data", "laws", "plan", "runs")


@pytest.mark.parametrize("script", [f"{name}.py" for name in SCRIPTS])
def test_ctrl_c_while_loading_ends_it_without_a_traceback(tmp_path, script):
    for slow in ("argparse",) if script == "runs.py" else ("torch", "numpy"):
        (tmp_path / f"{slow}.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, ROOT / script], env=os.environ | {"PYTHONPATH": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == -signal.SIGINT


def test_laws_plans_and_tables_need_no_torch():
    code = "import sys, laws, plan, runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "main, arguments, near",
    [
        (train.main, "--token 1e6", "--tokens"),
        (train.main, "--hidden-sise=64", "--hidden-size"),
        (train.main, "--tokens 1e6 --lrr 1 --wormup 3", "--lr, --warmup"),
        (upcycle.main, "a b --experts 8 --top-k 2 --granular 4", "--granularity"),
        (grow.main, "a b --axis depth --operator direct --factor 2 --sed 3", "--seed"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_nearest_one(capsys, main, arguments, near):
    with pytest.raises(SystemExit) as left:
        main(arguments.split())
    assert left.value.code == 2 and capsys.readouterr().err.endswith(f" (did you mean {near}?)\n")


def test_a_home_directory_after_an_equals_sign_is_that(monkeypatch):
    monkeypatch.setenv("HOME", "/ada")
    parser = Parser()
    parser.add_argument("--out")
    for word, means in (("~/a b", "/ada/a b"), ("~", "/ada"), ("a~/b", "a~/b"), ("~~", "~~")):
        assert parser.parse_args([f"--out={word}"]).out == means


def test_a_flag_like_no_other_gets_no_guess(capsys):
    with pytest.raises(SystemExit):
        train.main(["--xyzzy"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --xyzzy\n")


def test_data_help_shows_the_table_of_corpora(capsys):
    with pytest.raises(SystemExit):
        data.main(["--help"])
    shown = capsys.readouterr().out
    assert "the C++ headers that PyTorch installs" in shown and "ids:32000" in shown and "Text is text" not in shown
