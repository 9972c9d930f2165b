"""The trainer as an instrument: what is interrupted, divided or continued gives the numbers of what is not."""

import contextlib
import csv
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import two_ranks
from safetensors.torch import load_file, save_file

import checkpoint
import data
import grow
import model
import muon
import runs
import settings
import train
import upcycle
from ranks import Ranks
from tokenizer import load_tokenizer

ROOT = Path(train.__file__).parent
TINY = "--hidden-size 32 --num-hidden-layers 2 --context 32 --batch-tokens 256 --dtype float32 --log-every 5".split()
MOE = "--experts 4 --top-k 2 --granularity 2".split()
TIMES = {"seconds", "tokens_per_second", "tflops", "mfu"}


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Two files of real text, and the cache of their tokens."""
    folder = tmp_path_factory.mktemp("texts")
    for name, modules in (("a", (argparse_text, json_text)), ("b", (random_text,))):
        (folder / f"{name}.txt").write_text("\n".join(m() for m in modules))
    return folder


def argparse_text():
    return Path(importlib.import_module("argparse").__file__).read_text()


def json_text():
    return Path(importlib.import_module("json.decoder").__file__).read_text()


def random_text():
    return Path(random.__file__).read_text()


@pytest.fixture
def here(tmp_path, monkeypatch, texts):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(texts, *flags):
    """train.py in this process, on file a unless told otherwise."""
    flags = [str(f) for f in flags]
    own = ["--data", str(texts / "a.txt")] if not {"--data", "--init", "--branch", "--resume"} & set(flags) else []
    shape = TINY if not {"--init", "--branch", "--resume"} & set(flags) else []
    assert train.main([*shape, *own, *flags]) == 0


def command(texts, *flags, torchrun=0):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", torchrun]
    flags = [*TINY, "--data", texts / "a.txt", *flags] if "--resume" not in flags else flags
    return [str(part) for part in (sys.executable, *(start if torchrun else []), ROOT / "train.py", *flags)]


FEW = ("--eval-tokens", 640)  # where evaluations are not what is tested
ENV = os.environ | {"PYTHONWARNINGS": "ignore"}
CAPTURE = dict(env=ENV, capture_output=True, text=True)


def table(path, without=TIMES):
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(f)]


def assert_same_run(a, b):
    for name in ("log.csv", "eval.csv"):
        assert table(Path(a) / name) == table(Path(b) / name)
    assert (Path(a) / "samples.txt").read_text() == (Path(b) / "samples.txt").read_text()
    one, two = load_file(Path(a) / "model.safetensors"), load_file(Path(b) / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def whole_or_asks_to_resume(folder):
    """The weights are whole at every instant; a folder whose parts are of two steps says how to mend it."""
    load_file(Path(folder) / "model.safetensors")
    try:
        return checkpoint.load(folder)
    except ValueError as error:
        return f"was killed while saving (first: python train.py --resume --out {folder})" in str(error)


# ---- interruption ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra, times", [([], 2), (MOE, 1)], ids=["dense", "mixture"])
def test_killed_at_any_instant_and_resumed_equals_the_uninterrupted_run(here, texts, extra, times):
    flags = [*extra, *FEW, "--tokens", 256 * 60, "--save-every", 1, "--eval-every", 20]  # it mostly saves
    flags += ["--save-at", ",".join(str(256 * step) for step in range(5, 60, 5))]
    run(texts, *flags, "--out", "calm")
    dice, kills = random.Random(len(extra)), 0
    process = subprocess.Popen(command(texts, *flags, "--out", "killed"), env=ENV, stdout=subprocess.DEVNULL)
    while not Path("killed/trainer.pt").exists():
        time.sleep(0.01)
    for _ in range(times):
        before = Path("killed/trainer.pt").stat().st_mtime_ns
        while process.poll() is None and Path("killed/trainer.pt").stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.2)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        assert whole_or_asks_to_resume("killed")
        process = subprocess.Popen(command(texts, "--resume", "--out", "killed"), env=ENV, stdout=subprocess.DEVNULL)
    assert process.wait() == 0 and kills == times
    assert_same_run("calm", "killed")
    for step in range(5, 60, 5):
        assert_same_run(f"calm/step-{step}", f"killed/step-{step}")


def test_ctrl_c_saves_leaves_with_130_and_resumes_exactly(here, texts):
    flags = ["--tokens", 256 * 200, "--save-every", 100000, "--eval-every", 50]
    run(texts, *flags, "--out", "calm")
    process = subprocess.Popen(command(texts, *flags, "--out", "stopped"), env=ENV, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step     10/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == 130 and "--resume --out stopped" in rest
    assert 10 <= checkpoint.read_trainer("stopped")["step"] < 200
    run(texts, "--resume", "--out", "stopped")
    assert_same_run("calm", "stopped")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's processes in /proc")
def test_two_ranks_save_before_either_leaves_though_each_hears_a_signal_twice(here, texts, tmp_path):
    """A scheduler signals each process, some twice, and torchrun ends all when one has gone. Saving takes seconds."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nreplace = os.replace\n"
        "os.replace = lambda a, b: (time.sleep(str(b).endswith('.pt')), replace(a, b))\n"
    )
    flags = ["--tokens", 256 * 2000, "--save-every", 100000, "--log-every", 1, *FEW, "--out", "stopped"]
    env = ENV | {"PYTHONPATH": str(tmp_path)}
    pipes = dict(env=env, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(command(texts, *flags, torchrun=2), **pipes)
    while not process.stdout.readline().startswith("step     10/"):
        pass
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    for i, rank in enumerate(2 * ranks):
        time.sleep(0.3 * (i == 2))
        os.kill(int(rank), signal.SIGTERM)
    assert "--resume --out stopped" in process.communicate(timeout=100)[0]
    assert checkpoint.read_trainer("stopped")["step"] == int(table("stopped/log.csv")[-1]["step"]) >= 10


def test_a_rank_that_fails_ends_the_others(here, texts, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n"
        "    import torch\n"
        "    def fail(*_): raise torch.OutOfMemoryError('no memory left')\n"
        "    torch.nn.utils.clip_grad_norm_ = fail\n"
    )
    flags = ["--tokens", 256 * 2000, *FEW, "--out", "failed"]
    env = ENV | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command(texts, *flags, torchrun=2), **CAPTURE | {"env": env}, timeout=100)
    assert done.returncode == 1 and "OutOfMemoryError: no memory left" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("reader", ["reads", "leaves"])
def test_a_closed_terminal_and_a_reader_that_leaves_lose_nothing(here, texts, number, reader):
    """Ctrl-C under `| tee log` ends tee as well; closing the terminal ends both."""
    flags = ["--tokens", 256 * 2000, "--save-every", 100000, "--log-every", 1, *FEW, "--out", "a run"]
    listens = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    process = subprocess.Popen(command(texts, *flags), env=ENV, **pipes)
    while not process.stdout.readline().startswith("step     10/"):
        pass
    if reader == "leaves":
        process.stdout.close()
    process.send_signal(number)
    said, wrong = process.communicate(timeout=100)
    assert "Traceback" not in wrong
    assert reader == "leaves" or "--resume --out 'a run'" in said
    assert process.wait() == 128 + number
    assert checkpoint.read_trainer("a run")["step"] == int(table("a run/log.csv")[-1]["step"]) >= 10


def test_output_that_nobody_can_read_does_not_stop_a_run(here, texts):
    tail = " ".join(map(shlex.quote, command(texts, "--tokens", 2560, *FEW)))
    for where in ("> /dev/full", ">&- 2>&-", "| true"):
        out = f"out-{len(where)}"
        done = subprocess.run(f"{tail} --out {out} {where}", shell=True, **CAPTURE)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (where, done.stderr)
        assert checkpoint.read_trainer(out)["step"] == 10


def test_weights_that_are_no_numbers_end_a_run_in_words(here, texts, capsys):
    run(texts, "--tokens", 256, "--out", "bad")
    weights = load_file("bad/model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, "bad/model.safetensors", {"format": "pt"})
    assert train.main(["--init", "bad", "--tokens", "2560", "--out", "child"]) == 1
    assert "step 0: the loss is no number: stopped. Last save: none" in capsys.readouterr().out
    with pytest.raises(ValueError, match="logits are not finite"):
        list(model.generate(checkpoint.load("bad"), [1], 3))


def test_a_run_whose_loss_is_lost_before_a_sample_ends_in_words(here, texts, monkeypatch, capsys):
    """Step 3 is sampled, but not logged, evaluated or saved."""
    get = train.get_optimizers

    def spoiled(parameters, *rest):
        optimizers = get(parameters, *rest)
        optimizers[0].register_step_post_hook(lambda *_: parameters["model.norm.weight"].data.fill_(math.nan))
        return optimizers

    monkeypatch.setattr(train, "get_optimizers", spoiled)
    flags = f"--tokens {256 * 30} --eval-every 100 --save-every 100 --out bad --data {texts / 'a.txt'}".split()
    assert train.main([*TINY, "--log-every", "100", *flags]) == 1
    assert "step 3: the loss is nan" in capsys.readouterr().out


def test_a_full_disk_at_a_row_of_a_table_ends_in_a_line(here, texts):
    python, script, *flags = command(texts, "--tokens", 2560, *FEW, "--out", "full")
    code = f"""if True:
        import errno, runpy, sys
        sys.path.insert(0, {str(ROOT)!r})
        import record
        def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
        record.Record.log_step = full
        runpy.run_path({script!r}, run_name="__main__")"""
    done = subprocess.run([python, "-c", code, *flags], **CAPTURE)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "No space left on device (make room" in done.stderr


def test_a_text_that_is_read_several_times_is_told(here, texts, capsys):
    Path("short.txt").write_text("\n".join(argparse_text().splitlines()[:200]))
    run(texts, "--data", "short.txt", "--tokens", 256 * 80, "--out", "twice")
    said = capsys.readouterr().out
    assert re.search(r"note: short has [0-9,]+ tokens to train on: this run reads them [2-9]\.\d times", said)


def test_a_world_without_torchrun_is_refused_in_one_line(here, texts):
    for world, code in (("2", 1), ("", 0)):
        done = subprocess.run(command(texts, "--tokens", 0, *FEW), **CAPTURE | {"env": ENV | {"WORLD_SIZE": world}})
        assert done.returncode == code and "Traceback" not in done.stderr
        assert world == "" or done.stderr.startswith("WORLD_SIZE is 2, but RANK or MASTER_ADDR is not set")


def test_resuming_a_finished_run_changes_nothing(here, texts, capsys):
    run(texts, "--tokens", 2560, "--out", "done")
    before = {p.name: p.read_bytes() for p in Path("done").iterdir()}
    run(texts, "--resume", "--out", "done")
    assert "is finished" in capsys.readouterr().out
    assert before == {p.name: p.read_bytes() for p in Path("done").iterdir()}


def test_a_full_disk_while_saving_leaves_the_old_checkpoint(here, texts):
    run(texts, "--tokens", 2560, "--out", "warm")  # the cache of tokens is made
    limit = Path("warm/model.safetensors").stat().st_size + 20000  # room for the weights, not for trainer.pt

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    shutil.copytree("warm", "full")
    state = checkpoint.read_trainer("full")
    state["finished"], state["settings"]["tokens"] = False, 5120
    torch.save({**state, "weights": {k: v.clone() for k, v in state["weights"].items()}}, "full/trainer.new")
    os.replace("full/trainer.new", "full/trainer.pt")
    old = Path("full/trainer.pt").read_bytes()
    done = subprocess.run(command(texts, "--resume", "--out", "full"), preexec_fn=small_disk, **CAPTURE)
    assert done.returncode == 1 and "could not be saved" in done.stderr and "Traceback" not in done.stderr
    assert Path("full/trainer.pt").read_bytes() == old
    assert whole_or_asks_to_resume("full")
    run(texts, "--resume", "--out", "full")
    assert table("full/eval.csv")[-1]["step"] == "20"


@pytest.mark.parametrize("axis", ["depth", "width"])
def test_a_mask_opens_from_the_small_models_loss_and_resumes_inside(here, texts, axis, capsys):
    run(texts, "--tokens", 256 * 20, "--out", "small")
    grow.main(["small", "grown", "--axis", axis, "--operator", "random", "--factor", "2"])
    assert "--mask-steps" in error_of(["--init", "grown"], capsys)
    child = ["--init", "grown", "--mask-steps", 50, "--tokens", 256 * 60, "--batch-tokens", 256, "--log-every", 1]
    child += ["--dtype", "float32", "--micro-batch", 4, "--eval-every", 30, "--save-at", 256 * 30]
    run(texts, *child, "--out", "calm")
    small, *_ = [float(row["a_loss"]) for row in table("small/eval.csv")][::-1]
    start, half, end = (float(row["a_loss"]) for row in table("calm/eval.csv"))
    assert abs(start - small) < 1e-5 and end < start
    losses = [float(row["loss"]) for row in table("calm/log.csv")]
    assert abs(losses[50] - losses[49]) < 0.5  # the mask folds in between
    assert "mask is not open" in error_of(["--branch", "calm/step-30"], capsys)
    run(texts, "--init", "calm/step-30", "--tokens", 0)
    assert f"{half:.4f}" in capsys.readouterr().out  # the snapshot holds what the model computed with
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, child), "--out", "killed",
                                "--save-every", "1"], env=ENV, stdout=subprocess.DEVNULL)  # fmt: skip
    while not Path("killed/trainer.pt").exists() or checkpoint.read_trainer("killed")["step"] < 5:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert 5 <= checkpoint.read_trainer("killed")["step"] < 50
    run(texts, "--resume", "--out", "killed")
    assert_same_run("calm", "killed")
    if axis == "width":
        two_ranks(ROOT / "train.py", *child, "--out", "two")
        assert np.abs(np.array(losses) - [float(row["loss"]) for row in table("two/log.csv")]).max() < 1e-4


# ---- many processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], MOE], ids=["dense", "mixture"])
def test_two_processes_and_shards_equal_one(here, texts, extra):
    flags = [*extra, *FEW, "--tokens", 256 * 50, "--micro-batch", 2, "--log-every", 1, "--eval-every", 25]
    flags += ["--lr", 0.003]  # a high rate would magnify what rounding does
    run(texts, *flags, "--out", "one")
    for out, more in (("two", []), ("shards", ["--fsdp"])):
        two_ranks(ROOT / "train.py", *TINY, "--data", texts / "a.txt", *flags, *more, "--out", out)
    columns = ["loss", "balance_loss", "z_loss"] if extra else ["loss"]
    one, two, shards = (
        np.array([[float(row[c]) for c in columns] for row in table(f"{o}/log.csv")]) for o in ("one", "two", "shards")
    )
    assert len(one) == 50 and np.abs(two - one).max() < 1e-4 and np.abs(shards - two).max() < 1e-4
    a, b = (float(table(f"{out}/eval.csv")[-1]["a_loss"]) for out in ("one", "shards"))
    assert abs(a - b) < 1e-4
    checkpoint.load("shards")
    run(texts, "--resume", "--out", "shards")  # the checkpoint knows nothing of shards


def test_compiled_shards_equal_one(here, texts):
    """What a machine of several GPUs does unless told otherwise: --fsdp and torch.compile together."""
    flags = [*MOE, *FEW, "--tokens", 256 * 8, "--micro-batch", 2, "--log-every", 1, "--lr", 0.003]
    run(texts, *flags, "--out", "one")
    flags += ["--fsdp", "--compile", "--out", "compiled"]
    two_ranks(ROOT / "train.py", *TINY, "--data", texts / "a.txt", *flags)
    one, two = ([float(row["loss"]) for row in table(f"{out}/log.csv")] for out in ("one", "compiled"))
    assert len(one) == 8 and np.abs(np.subtract(one, two)).max() < 1e-4


def test_upcycled_in_memory_in_shards_and_in_a_folder_is_the_same_mixture(here, texts):
    run(texts, "--tokens", 256, "--num-hidden-layers", 4, "--out", "parent")
    upcycle.upcycle_folder("parent", "folder", 4, 2, granularity=2)
    flags = "--init parent --upcycle 4x2 --granularity 2 --batch-tokens 256 --tokens 256 --lr 1e-30".split()
    for out, more in (("replicas", []), ("shards", ["--fsdp"])):
        two_ranks(ROOT / "train.py", *flags, *more, "--out", out)
    whole, one, two = (load_file(f"{name}/model.safetensors") for name in ("folder", "replicas", "shards"))
    assert whole.keys() == one.keys() == two.keys()  # and so small a rate moves no bit
    assert all(torch.equal(whole[n], one[n]) and torch.equal(whole[n], two[n]) for n in whole)


def test_under_torchrun_one_rank_speaks_and_all_leave_with_2(here, texts):
    done = subprocess.run(command(texts, "--lr", "-1", torchrun=2), **CAPTURE)
    assert done.stderr.count("train.py: error:") >= 1 and done.returncode
    assert "exitcode  : 2" in done.stderr


# ---- lineage --------------------------------------------------------------------------------------------------------


def windows_of(folder, texts):
    """The windows that the last training in a folder's lineage read."""
    lineage = checkpoint.read_json(Path(folder) / "run.json")["lineage"]
    corpora = data.prepare(lineage[-1]["settings"]["data"], load_tokenizer("bytes"))
    seed, sequence, read, notes = data.position(lineage[:-1], corpora, 32, load_tokenizer("bytes").key)
    reader = data.Reader(corpora, 32, lineage[0]["seed"] if seed is None else seed, sequence, read)
    return [item for _ in range(lineage[-1]["tokens"] // 256) for item in reader.take(8)]


def test_what_a_flag_does_not_do_is_said(here, texts, capsys):
    run(texts, "--tokens", 512, *FEW, "--out", "parent")
    capsys.readouterr()
    for flags, said in (([], False), (["--seed", 2], True), (["--seed", 2, "--upcycle", "2x2"], False)):
        run(texts, "--init", "parent", "--tokens", 256, *FEW, *flags, "--out", "child", "--overwrite")
        assert ("--seed 2 changes nothing" in capsys.readouterr().out) == said
    cases = ("min-lr", "constant", True), ("min-lr", "cosine", False), ("decay-fraction", "cosine", True)
    for name, schedule, said in cases:
        run(texts, "--tokens", 256, *FEW, f"--{name}", 1e-4, "--schedule", schedule, "--out", "child", "--overwrite")
        assert (f"--{name} 0.0001 changes nothing with" in capsys.readouterr().out) == said
    run(texts, "--init", "parent", "--tokens", 256, *FEW, "--upcycle", "2x2", "--out", "child", "--overwrite")
    run(texts, "--init", "child", "--tokens", 256, *FEW, "--upcycle", "4x4", "--out", "more")
    assert "note: equal copies that get the same tokens stay equal" in capsys.readouterr().out


def test_a_child_reads_on_where_its_parent_stopped(here, texts):
    run(texts, "--tokens", 256 * 20, "--out", "whole")
    run(texts, "--tokens", 256 * 10, "--out", "half")
    run(texts, "--init", "half", "--tokens", 256 * 10, "--seed", 7, "--batch-tokens", 256, "--out", "child")
    half, child = windows_of("half", texts), windows_of("child", texts)
    assert half + child == windows_of("whole", texts) and not set(half) & set(child)
    assert checkpoint.read_trainer("child")["read"] == checkpoint.read_trainer("whole")["read"] == {"a": 160}
    lineage = checkpoint.read_json("child/run.json")["lineage"]
    assert [step["tokens"] for step in lineage] == [2560, 2560]


def test_replay_and_an_evaluated_corpus_are_counted_apart(here, texts):
    run(texts, "--tokens", 2560, "--out", "parent")
    spec = f"{texts}/b.txt:0.75,{texts}/a.txt:0.25"
    run(texts, "--init", "parent", "--tokens", 256 * 8, "--data", spec, "--batch-tokens", 256, "--out", "replay")
    step = checkpoint.read_json("replay/run.json")["lineage"][-1]
    assert sum(d["tokens"] for d in step["data"].values()) == 2048
    assert abs(step["data"]["b"]["tokens"] - 1536) <= 64
    spec = f"{texts}/b.txt:1,{texts}/a.txt:0"
    run(texts, "--init", "parent", "--tokens", 2560, "--data", spec, "--batch-tokens", 256, "--out", "none")
    assert checkpoint.read_json("none/run.json")["lineage"][-1]["data"]["a"]["tokens"] == 0
    rows = table("none/eval.csv")
    assert float(rows[-1]["b_loss"]) < float(rows[0]["b_loss"]) and "a_loss" in rows[0]


def test_a_branch_of_a_snapshot_ends_as_the_trunk_that_decays_there(here, texts):
    run(texts, "--tokens", 256 * 40, "--save-at", "7680", "--out", "trunk")
    run(texts, "--branch", "trunk/step-30", "--tokens", 2560, "--out", "branch")
    one, two = load_file("trunk/model.safetensors"), load_file("branch/model.safetensors")
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert table("branch/eval.csv")[-1]["a_loss"] == table("trunk/eval.csv")[-1]["a_loss"]
    assert [s["tokens"] for s in checkpoint.read_json("branch/run.json")["lineage"]] == [7680, 2560]
    assert table("trunk/step-30/log.csv")[-1]["step"] == "30"


def test_a_public_folder_starts_a_lineage(here, texts):
    config = model.Config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8)
    checkpoint.save(model.init_weights(model.Transformer(config), 1), Path("public"), load_tokenizer("bytes"))
    flags = ["--init", "public", "--tokens", 2560, "--context", 32, "--batch-tokens", 256, "--data", texts / "a.txt"]
    run(texts, *flags, "--source-tokens", "2e12", "--out", "child")
    first, second = checkpoint.read_json("child/run.json")["lineage"]
    assert first == {"step": "source", "name": "public", "tokens": 2_000_000_000_000} and second["tokens"] == 2560


def test_an_init_of_a_folder_killed_while_saving_asks_to_resume_it(here, texts, capsys):
    run(texts, "--tokens", 2560, "--out", "torn")
    run_json = checkpoint.read_json("torn/run.json")
    checkpoint.write_json(Path("torn/run.json"), run_json | {"step": 3})
    assert "--resume --out torn" in error_of(["--init", "torn"], capsys)


def test_an_upcycled_and_a_stacked_child_start_where_their_parent_ended(here, texts):
    run(texts, "--tokens", 5120, "--out", "parent")
    child = ["--init", "parent", "--tokens", 2560, "--batch-tokens", 256]
    run(texts, *child, "--upcycle", "4x2", "--granularity", 2, "--out", "up")
    assert table("up/eval.csv")[0]["a_loss"] == table("parent/eval.csv")[-1]["a_loss"]
    run(texts, *child, "--stack", 3, "--out", "deep")
    assert checkpoint.read_config("deep").num_hidden_layers == 6
    up, deep = (checkpoint.read_json(f"{name}/run.json")["lineage"] for name in ("up", "deep"))
    assert [s["step"] for s in up] == ["train", "upcycle", "train"]
    assert up[1]["experts"] == 4 and up[1]["granularity"] == 2
    assert [s["step"] for s in deep] == ["train", "grow", "train"] and deep[1]["layers"] == [0, 1, 0, 1, 0, 1]
    run(texts, "--resume", "--out", "up")


# ---- the optimizers -------------------------------------------------------------------------------------------------


def test_a_branch_keeps_adamw_and_an_init_may_change_it(here, texts):
    flags = [*FEW, "--tokens", 256 * 4]
    run(texts, *MOE, *flags, "--optimizer", "adamw", "--save-at", 512, "--out", "parent")
    run(texts, "--branch", "parent/step-2", *flags, "--out", "branch")
    run(texts, "--init", "parent", "--batch-tokens", 256, *flags, "--out", "child")
    assert table("child/eval.csv")[0]["a_loss"] == table("parent/eval.csv")[-1]["a_loss"]
    for folder, optimizer in (("parent", "adamw"), ("branch", "adamw"), ("child", "muon")):
        state = checkpoint.read_trainer(folder)
        assert state["settings"]["optimizer"] == optimizer
        assert checkpoint.read_json(f"{folder}/run.json")["lineage"][-1]["settings"]["optimizer"] == optimizer
        by_muon = muon.hidden(state["weights"]) if optimizer == "muon" else {}
        assert state["optimizer"].keys() == state["weights"].keys()
        for name, kept in state["optimizer"].items():
            assert kept.keys() == ({"momentum_buffer"} if name in by_muon else {"exp_avg", "exp_avg_sq", "step"})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adamw_has_what_muon_has_not_and_only_matrices_decay(optimizer):
    config = model.Config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8, experts=2)
    one, two = (dict(model.init_weights(model.Transformer(config), 1).named_parameters()) for _ in range(2))
    s = settings.get_parser().parse_args(["--optimizer", optimizer, "--lr", "3e-3", "--dtype", "float32"])
    optimizers = train.get_optimizers(one, s, {}, Ranks())
    decay = [[p for p in two.values() if p.dim() >= 2], [p for p in two.values() if p.dim() < 2]]
    groups = [{"params": params, "weight_decay": d} for params, d in zip(decay, (0.1, 0.0))]
    adamw = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for _ in range(3):
        for name, p in one.items():
            p.grad = two[name].grad = torch.randn_like(p)
        for o in (*optimizers, adamw):
            o.step()
    equal = {name for name, p in one.items() if torch.equal(p, two[name])}
    assert equal == one.keys() - (muon.hidden(one).keys() if optimizer == "muon" else set())


@pytest.mark.parametrize("optimizer, factor", [("adamw", 1), ("muon", muon.OTHERS)])
def test_beside_muon_adamw_has_a_multiple_of_the_rate(here, texts, optimizer, factor):
    flags = ["--tokens", 256, "--lr", 1e-3, "--weight-decay", 0, "--optimizer", optimizer]
    run(texts, *FEW, *flags, "--out", "run")
    state = checkpoint.read_trainer("run")
    before = model.init_weights(model.Transformer(model.Config(**state["config"])), 1).state_dict()
    moved = {name: (t - before[name]).abs().max().item() for name, t in state["weights"].items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert moved[name] == pytest.approx(1e-3 * factor, rel=0.01)  # a first step of AdamW moves by the rate
    q = moved["model.layers.0.self_attn.q_proj.weight"]
    assert q == pytest.approx(1e-3, rel=0.01) if optimizer == "adamw" else 2e-4 < q < 2e-3
    assert state["lr"] == 1e-3  # from which a branch would decay


@pytest.mark.parametrize("extra, losses", [
    ([], [5.538884, 5.405789, 5.234589, 5.076028, 4.918006, 4.768184]),
    (MOE, [5.543026, 5.387747, 5.229274, 5.071437, 4.928082, 4.772441])], ids=["dense", "mixture"])  # fmt: skip
def test_with_adamw_a_run_has_the_losses_it_had_before_there_was_muon(here, extra, losses):
    Path("squares.txt").write_text("".join(chr(97 + i * i % 23 % 17) for i in range(20000)))
    flags = ["--data", "squares.txt", "--tokens", 256 * 6, "--log-every", 1, "--num-attention-heads", 4]
    run(here, *extra, *FEW, *flags, "--optimizer", "adamw", "--lr", 3e-3, "--out", "run")
    assert [float(row["loss"]) for row in table("run/log.csv")] == pytest.approx(losses, abs=1e-3)  # muon's: 0.1 above


# ---- horizon, schedule, counts --------------------------------------------------------------------------------------


def test_every_horizon_means_the_same_number_of_steps(here, texts):
    config = model.Config(hidden_size=32, intermediate_size=96, num_hidden_layers=2, head_dim=8)
    module = model.Transformer(config)
    active, flops = module.num_parameters()["N_active"], module.flops_per_token(32)
    for i, horizon in enumerate((["--tokens", 5120], ["--flops", 5120 * flops], ["--tokens-per-param", 5120 / active])):
        run(texts, *horizon, "--out", f"h{i}")
        assert table(f"h{i}/log.csv")[-1]["step"] == "20"
        assert float(table(f"h{i}/log.csv")[-1]["flops"]) == 5120 * flops


def test_schedules_have_their_shapes():
    args = settings.get_parser().parse_args(["--lr", "1", "--min-lr", "0.1", "--warmup", "10", "--schedule", "wsd"])
    rates = [train.rate(s, 100, args) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == rates[74] == 1 and rates[99] == pytest.approx(0.1 + 0.9 / 25)
    args.schedule = "cosine"
    rates = [train.rate(s, 110, args) for s in range(110)]
    assert rates[10] == 1 and rates[60] == pytest.approx(0.55) and rates[109] < 0.101
    args.schedule = "constant"
    assert {train.rate(s, 100, args) for s in range(10, 100)} == {1}


def test_logged_loss_is_the_mean_over_the_whole_batch(here, texts):
    for m in (1, 8):
        run(texts, "--tokens", 256 * 3, "--micro-batch", m, "--log-every", 1, "--out", f"m{m}")
    for a, b in zip(table("m1/log.csv"), table("m8/log.csv")):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=2e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)


def test_zero_tokens_evaluates_and_writes_nothing(here, texts, capsys):
    run(texts, "--tokens", 2560, "--out", "done")
    last = float(table("done/eval.csv")[-1]["a_loss"])
    before = sorted(Path(".").rglob("*"))
    run(texts, "--init", "done", "--tokens", 0)
    assert f"{last:.4f}" in capsys.readouterr().out and before == sorted(Path(".").rglob("*"))


def test_a_run_leaves_everything_that_the_readme_promises(here, texts, capsys):
    run(texts, *MOE, "--tokens", 2560)
    files = {p.name for p in Path("out/run-1").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "run.json",
                     "trainer.pt", "log.csv", "eval.csv", "samples.txt", "loss.png"}  # fmt: skip
    samples = Path("out/run-1/samples.txt").read_text()
    assert [f"step {s} of 10" in samples for s in (0, 1, 5, 10)] == [True] * 4
    out = capsys.readouterr().out
    assert "3-gram" in out and "layer  1" in out and "--init out/run-1" in out
    row = table("out/run-1/log.csv", ())[-1]
    assert row["mfu"] == "" and float(row["router_entropy"]) > 0 and float(row["dropped"]) == 0
    run(texts, "--tokens", 2560)
    assert Path("out/run-2").exists()


def test_eval_tokens_is_what_an_evaluation_reads(here, texts):
    run(texts, "--tokens", 2560, "--eval-tokens", 320, "--out", "few")
    corpus, module = data.prepare(str(texts / "a.txt"), load_tokenizer("few"))[0], checkpoint.load("few")
    few, all = (module(*data.validation_windows(corpus, 32, most))[1].item() for most in (320, 10**6))
    assert float(table("few/eval.csv")[-1]["a_loss"]) == pytest.approx(few, abs=2e-6) != pytest.approx(all, abs=1e-3)


# ---- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], ["--no-qk-norm"], [*MOE]], ids=["qwen3", "llama", "mixture"])
def test_eval_csv_equals_the_loss_of_transformers_on_the_same_windows(here, texts, extra, transformers):
    run(texts, *extra, "--tokens", 5120, "--out", "done")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("done").eval()
    corpus = data.prepare(str(texts / "a.txt"), load_tokenizer("done"))[0]
    ids, targets = data.validation_windows(corpus, 32)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten())
    assert abs(loss.item() - float(table("done/eval.csv")[-1]["a_loss"])) < 1e-3


def test_pipeline_of_transformers_writes_text_that_round_trips(here, texts, transformers):
    run(texts, "--tokens", 5120, "--out", "done")
    pipe = transformers.pipeline("text-generation", "done", device="cpu")
    text = pipe("def naïve(", max_new_tokens=40, do_sample=False)[0]["generated_text"]
    assert text.startswith("def naïve(") and len(text) > 20
    tokenizer = transformers.AutoTokenizer.from_pretrained("done")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# ---- bad input ------------------------------------------------------------------------------------------------------


def error_of(flags, capsys):
    """Runs train.py on flags that are wrong; returns the one line it says. Nothing may be created or changed."""

    def everything():
        return {p: p.stat().st_mtime_ns for p in Path(".").rglob("*")}

    before = everything()
    with pytest.raises(SystemExit) as left:
        train.main([str(f) for f in flags])
    lines = capsys.readouterr().err.strip().split("\n")
    assert left.value.code == 2
    assert lines[-1].startswith("train.py: error: ") and len(lines) <= 4, lines
    assert everything() == before
    return lines[-1]


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, texts):
    """A folder of files and checkpoints to go wrong with."""
    folder = tmp_path_factory.mktemp("shelf")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        run(texts, "--tokens", 2560, "--out", "done")
        run(texts, *MOE, "--tokens", 2560, "--out", "moe")
        Path("empty.txt").touch()
        Path("latin.txt").write_bytes("d\xe9j\xe0 vu".encode("latin-1") * 1000)
        Path("short.txt").write_text("too short " * 50)
        Path("a.txt").write_text("abc " * 2000)
        Path("sub").mkdir()
        Path("sub/a.txt").write_text("abc " * 2000)
        Path("bad.jsonl").write_text('{"texts": "a"}\n')
        for name, tokens in (("odd", b"\0" * 4001), ("large", np.full(4000, 300, "<u2").tobytes())):
            Path(name).mkdir()
            Path(name, "meta.json").write_text(json.dumps({"dtype": "uint16", "vocab_size": 256, "bytes_per_token": 1}))
            Path(name, "train.bin").write_bytes(tokens)
            Path(name, "val.bin").write_bytes(np.zeros(4000, "<u2").tobytes())
        for name in ("noconfig", "torn", "shape", "gpt2", "outside", "noweights", "evil"):
            shutil.copytree("done", name)
            if name != "evil":
                Path(name, "trainer.pt").unlink()
        Path("noconfig/config.json").unlink()
        Path("noweights/model.safetensors").unlink()
        weights = Path("torn/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
        for name, change in (("shape", {"intermediate_size": 100}), ("gpt2", {"model_type": "gpt2"})):
            config = json.loads(Path(name, "config.json").read_text()) | change
            Path(name, "config.json").write_text(json.dumps(config))
        Path("outside/model.safetensors").unlink()
        index = {"weight_map": {"x": "../done/model.safetensors"}}
        Path("outside/model.safetensors.index.json").write_text(json.dumps(index))
        Path("evil/trainer.pt").write_bytes(pickle.dumps(Evil()))
        grow.grow_folder("done", "masked", "depth", "random", 2, None, 1)
        Path("notarun").mkdir()
        Path("notarun/thesis.txt").write_text("years of work")
        Path("data").exists() and shutil.rmtree("data")
    return folder


BAD = {
    "unknown corpus": ("--data pyhton", "pyhton"),
    "missing file": ("--data nowhere.txt", "nowhere.txt"),
    "empty file": ("--data empty.txt", "empty.txt"),
    "not UTF-8": ("--data latin.txt", "UTF-8"),
    "too short for the context": ("--data short.txt", "256"),
    "no text field": ("--data bad.jsonl", "text"),
    "odd .bin": ("--data odd", "odd"),
    "ids beyond the vocabulary": ("--data large", "300"),
    "two corpora of one name": ("--data a.txt,sub/a.txt", "two corpora"),
    "all weights zero": ("--data a.txt:0", "weight"),
    "negative weight": ("--data a.txt:-1", "-1"),
    "unknown tokenizer": ("--tokenizer gpt5_base", "gpt5_base"),
    "heads that do not divide": ("--num-attention-heads 3 --head-dim 32 --num-key-value-heads 2", "3"),
    "hidden size that heads do not divide": ("--hidden-size 131", "131"),
    "odd head": ("--head-dim 15", "15"),
    "batch not divisible": ("--batch-tokens 1000", "1000"),
    "micro-batch not dividing": ("--micro-batch 3", "3"),
    "two horizons": ("--tokens 1e6 --flops 1e12", "--flops"),
    "negative rate": ("--lr -1", "-1"),
    "rate of zero": ("--lr 0", "0"),
    "rate below its minimum": ("--lr 1e-3 --min-lr 1e-2", "0.01"),
    "rate is no number": ("--lr fast", "fast"),
    "rate is nan": ("--lr nan", "nan"),
    "fractional tokens": ("--tokens 10.5", "10.5"),
    "negative tokens": ("--tokens -5", "-5"),
    "zero context": ("--context 0", "--context"),
    "decay fraction": ("--decay-fraction 1.5", "1.5"),
    "warmup beyond the run": ("--tokens 20480 --warmup 11", "--warmup 11 is beyond the run's 10 steps"),
    "snapshot beyond the run": ("--tokens 1e5 --save-at 2e5", "200,000"),
    "snapshot before the first step": ("--tokens 1e5 --save-at 0", "--save-at 0"),
    "one snapshot of two before the first step": ("--tokens 1e5 --save-at 1,5e4", "--save-at 1 is"),
    "zero layers": ("--num-hidden-layers 0", "num_hidden_layers"),
    "abbreviated flag": ("--hidden 64", "--hidden"),
    "unknown optimizer": ("--optimizer sgd", "sgd"),
    "unknown schedule": ("--schedule linear", "linear"),
    "missing init": ("--init nowhere", "nowhere"),
    "no config.json": ("--init noconfig", "config.json"),
    "no weights": ("--init noweights", "weights"),
    "truncated weights": ("--init torn", "safetensors"),
    "wrong shape": ("--init shape", "config.json says"),
    "unsupported architecture": ("--init gpt2", "gpt2"),
    "shard outside": ("--init outside", "outside the folder"),
    "shape with init": ("--init done --hidden-size 64", "--hidden-size"),
    "two parents": ("--init done --branch done", "one parent"),
    "upcycling of nothing": ("--upcycle 8x2", "--init"),
    "upcycling that is no recipe": ("--init done --upcycle eight", "eight"),
    "a mixture to no multiple of its experts": ("--init moe --upcycle 6x2", "multiple"),
    "more experts a token than there are": ("--init done --upcycle 2x4", "4"),
    "stacking of nothing": ("--stack 2", "--init"),
    "mask of nothing": ("--mask-steps 5", "--init"),
    "mask where there is none": ("--init done --mask-steps 5", "done has no mask"),
    "stacking behind a closed mask": ("--init masked --stack 2 --mask-steps 5", "masked has a closed mask"),
    "upcycling behind a closed mask": ("--init masked --upcycle 8x2", "masked has a closed mask"),
    "stacking no times": ("--init done --stack 0", "0"),
    "a branch of a run that is at its end": ("--branch done --tokens 256", "decayed"),
    "a file where a folder should be": ("--out a.txt/sub", "a.txt"),
    "stacking once": ("--init done --stack 1", "1"),
    "data with branch": ("--branch done --data python", "--data"),
    "branch of no run": ("--branch shape", "trainer.pt"),
    "source tokens of nothing": ("--source-tokens 1e9", "--init"),
    "resume without out": ("--resume", "--out"),
    "resume without a run": ("--resume --out nowhere", "nowhere"),
    "resume with other flags": ("--resume --out done --lr 0.5", "0.5"),
    "resume with another optimizer": ("--resume --out done --optimizer adamw", "the run has muon"),
    "pickle that runs code": ("--resume --out evil", "trainer.pt"),
    "existing out": ("--out done", "--overwrite"),
    "overwrite of a foreign folder": ("--out notarun --overwrite", "notarun"),
    "overwrite of the parent": ("--init done --out done --overwrite", "parent"),
    "no such device": ("--device cuda", "cuda"),
    "unknown device": ("--device tpu", "tpu"),
    "shards of one rank": ("--fsdp", "torchrun"),
    "K larger than E": ("--experts 2 --top-k 4", "4"),
    "granularity that does not divide": ("--experts 4 --granularity 7", "7"),
    "mixture flag without experts": ("--granularity 2", "--experts"),
    "router without gradient": ("--experts 4 --top-k 1", "softmax-topk"),
    "router that no format holds": ("--experts 4 --router softmax-topk --no-qk-norm", "or a model with it"),
    "capacity of zero": ("--experts 4 --capacity-factor 0", "capacity"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(case, shelf, monkeypatch, capsys):
    flags, words = BAD[case]
    if case == "no such device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(shelf)
    own = [] if {"--data", "--init", "--branch", "--resume"} & set(flags.split()) else ["--data", "a.txt"]
    assert words in error_of([*flags.split(), *own], capsys)
    assert not Path("evil-was-here").exists()


def test_numbers_are_read_as_people_write_them():
    flags = "--tokens 1e6 --batch-tokens 2_000_000 --seed 0 --save-at 1e6 --save-at 2_000_000"
    args = settings.get_parser().parse_args(flags.split())
    assert (args.tokens, args.batch_tokens, args.seed, args.save_at) == (10**6, 2 * 10**6, 0, [10**6, 2 * 10**6])


def test_every_flag_has_a_help_line():
    assert all(action.help for action in settings.get_parser()._actions)


# ---- changed text ---------------------------------------------------------------------------------------------------


def ready(folder, tokens):
    """A folder of ready tokens of the kind `bytes`."""
    Path(folder).mkdir(exist_ok=True)
    meta = {"dtype": "uint16", "vocab_size": 256, "bytes_per_token": 1}
    Path(folder, "meta.json").write_text(json.dumps(meta))
    for name, part in (("train.bin", tokens[:-500]), ("val.bin", tokens[-500:])):
        Path(folder, name).write_bytes(np.array(part, "<u2").tobytes())


def test_text_that_has_changed_is_not_gone_on_with_but_by_init_which_says_so(here, texts, capsys):
    text = (texts / "b.txt").read_bytes()[:12000]
    Path("mine.txt").write_bytes(text)
    Path("seen.txt").write_bytes(text)
    ready("tokens", list(text))
    spec = "mine.txt:0.5,tokens:0.5,seen.txt:0"
    run(texts, "--data", spec, "--tokens", 256 * 6, "--save-at", 256 * 3, "--out", "trunk")
    run(texts, "--resume", "--out", "trunk/step-3", "--micro-batch", 8)
    capsys.readouterr()

    def refused(name, *words):
        before = {p: p.stat().st_mtime_ns for p in Path("trunk").rglob("*")}
        for flags in (["--resume", "--out", "trunk/half"], ["--branch", "trunk/half", "--tokens", "256"]):
            with pytest.raises(SystemExit) as left:
                train.main(flags)
            line = capsys.readouterr().err.strip().split("\n")[-1]
            assert left.value.code == 2 and line.startswith(f"train.py: error: the text of {name} has changed: ")
            assert "(the old text: --data says where it lies; or --init to go on with the new one)" in line
            assert all(word in line for word in words)
        assert before == {p: p.stat().st_mtime_ns for p in Path("trunk").rglob("*")} and not Path("out").exists()

    state = checkpoint.read_trainer("trunk/step-3")
    shutil.copytree("trunk/step-3", "trunk/half")
    state["finished"], state["settings"]["tokens"] = False, 256 * 9
    torch.save({**state, "weights": {k: v.clone() for k, v in state["weights"].items()}}, "trunk/half/trainer.new")
    os.replace("trunk/half/trainer.new", "trunk/half/trainer.pt")
    Path("mine.txt").write_bytes(text.replace(b"e", b"a", 1))  # one letter, of the same length
    refused("mine", str(here / "mine.txt"))
    Path("mine.txt").write_bytes(text)
    ready("tokens", [*text[::-1]])
    refused("tokens", str(here / "tokens"))
    ready("tokens", list(text))
    Path("seen.txt").write_bytes(text + b"more")  # of weight 0: its losses would not compare
    refused("seen", str(here / "seen.txt"))
    run(texts, "--init", "trunk/half", "--tokens", 256, "--batch-tokens", 256, "--out", "child")
    assert "note: the text of seen has changed: what was read of the old one does not count" in capsys.readouterr().out
    Path("seen.txt").write_bytes(text)
    run(texts, "--resume", "--out", "trunk/half")
    assert "has changed" not in capsys.readouterr().out


def test_a_run_goes_on_where_its_text_lies_now(here, texts, capsys):
    """From another folder, or after the text has moved: --data names the same corpora there, and their bytes count."""
    text = (texts / "b.txt").read_bytes()[:12000]
    Path("mine.txt").write_bytes(text)
    Path("b.txt").write_bytes(text[:9000])
    flags = ["--tokens", 256 * 4, "--save-at", 512, "--schedule", "constant", "--save-every", 2]
    run(texts, "--data", "mine.txt:1,b.txt:0", *flags, "--out", "whole")
    Path("elsewhere").mkdir()
    Path("mine.txt").rename("elsewhere/mine.txt")

    def error(*flags):
        with pytest.raises(SystemExit):
            train.main([*map(str, flags)])
        return capsys.readouterr().err.strip().split("\n")[-1]

    branch = ["--branch", "whole/step-2", "--tokens", 512, "--out", "branch"]
    assert "no file in 'mine.txt'" in (lost := error(*branch)) and "--data says where it is now" in lost
    assert "cannot be given" in error(*branch, "--data", "elsewhere/mine.txt:0.5,b.txt:0.5")
    Path("mine.txt").write_bytes(text[::-1])
    assert "the text of mine has changed" in error(*branch, "--data", "mine.txt:1,b.txt:0")
    run(texts, *branch, "--data", "elsewhere/mine.txt:1,b.txt:0")
    step = json.loads(Path("branch/run.json").read_text())["lineage"][-1]
    assert step["data"]["mine"]["source"].endswith("elsewhere/mine.txt")


def test_the_default_corpus_of_another_python_names_both_versions():
    about = {"source": "python 3.99.1", "sha256": "new"}
    corpus = data.Corpus("python", 1.0, np.zeros(9), np.zeros(9), 1.0, 256, about)
    past = {"data": {"python": {"weight": 1.0, "tokens": 9, "source": "python 3.11.2", "sha256": "old"}}}
    with pytest.raises(ValueError, match="the text of python has changed: it was python 3.11.2, it is python 3.99.1"):
        data.same_text(past, [corpus])
    data.same_text({"data": {"python": {"weight": 1.0, "tokens": 9}}}, [corpus])  # an older folder may have no hash


# ---- other ranks, other micro-batches -------------------------------------------------------------------------------


THREE = "--experts 3 --top-k 2 --micro-batch 2".split()  # two ranks cut experts along their width


@pytest.mark.parametrize("extra", [[], THREE], ids=["dense", "mixture"])
def test_a_run_goes_on_with_other_ranks_shards_and_a_smaller_micro_batch(here, texts, extra, capsys):
    flags = [*extra, *FEW, "--tokens", 256 * 20, "--log-every", 1, "--save-at", f"{256 * 5},{256 * 10},{256 * 15}"]
    run(texts, *flags, "--out", "calm")

    def goes_on(source, out, *more, ranks=1):
        """Resumes a copy of the snapshot; returns what is said about it."""
        shutil.copytree(source, out)
        flags = ["--resume", "--out", out, *more]
        if ranks == 2:
            return two_ranks(ROOT / "train.py", *flags)
        capsys.readouterr()
        run(texts, *flags)
        return capsys.readouterr().out

    def losses(out, *columns):
        rows, (*_, last) = table(f"{out}/log.csv"), table(f"{out}/eval.csv")
        assert len(rows) == 20
        return np.array([float(row[c]) for row in rows for c in columns] + [float(last["a_loss"])])

    same = ["loss", "balance_loss", "z_loss"] if extra else ["loss"]
    assert "note: another number of ranks" in goes_on("calm/step-5", "two", ranks=2)
    assert "note:" not in goes_on("two/step-10", "shards", "--fsdp", ranks=2)
    assert "note: another number of ranks" in goes_on("shards/step-15", "one")
    said = goes_on("calm/step-5", "small", "--micro-batch", 1)
    if extra:
        assert "note: another micro-batch: the balancing loss" in said
    else:
        assert "note: another number of ranks, or another micro-batch" in said
    for out in ["two", "shards", "one"] if extra else ["two", "shards", "one", "small"]:
        assert np.abs(losses(out, *same) - losses("calm", *same)).max() < 1e-4, out
    micro = {out: checkpoint.read_trainer(out)["settings"]["micro_batch"] for out in ("calm", "two", "one", "small")}
    assert micro == (dict(calm=2, two=2, one=2, small=1) if extra else dict(calm=8, two=4, one=4, small=1))


# ---- what lies beside the weights -----------------------------------------------------------------------------------


@pytest.fixture
def public(here, texts):
    """A public folder with all that a publisher puts beside the weights, and the same text as ready tokens."""
    import tokenizers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train([str(texts / "a.txt")], vocab_size=300, special_tokens=["<|endoftext|>"])
    config = model.Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8,
                          max_position_embeddings=32, eos_token_id=0)  # fmt: skip
    checkpoint.save(model.init_weights(model.Transformer(config), 1), Path("public"))
    bpe.save("public/tokenizer.json")
    bpe.save_model("public")  # vocab.json and merges.txt
    chat = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    for name, content in {
        "tokenizer_config.json": json.dumps(chat), "special_tokens_map.json": '{"eos_token": "<|endoftext|>"}',
        "added_tokens.json": "{}", "tokenizer.model": "a SentencePiece model", "chat_template.jinja": "{{ messages }}",
        "generation_config.json": json.dumps({"temperature": 0.7, "do_sample": True, "eos_token_id": 0}),
        "LICENSE": "as you like", "NOTICE.txt": "by nobody",
    }.items():  # fmt: skip
        Path("public", name).write_text(content)
    ids = bpe.encode((texts / "a.txt").read_text()).ids
    ready("ids", ids)
    checkpoint.write_json("ids/meta.json", {"dtype": "uint16", "vocab_size": 300, "bytes_per_token": 2.0})
    return {p.name: p.read_bytes() for p in Path("public").iterdir() if p.suffix != ".safetensors"}


CHILD = ["--context", 32, "--batch-tokens", 256, "--dtype", "float32", "--tokens", 256 * 4, "--save-at", 256 * 2]


def assert_all_there(folder, public):
    for name in public.keys() - {"config.json"}:
        assert Path(folder, name).read_bytes() == public[name], (folder, name)


@pytest.mark.parametrize("own", [[], ["--tokenizer", "ids:300"]], ids=["the folder's tokenizer", "ids without text"])
def test_ready_tokens_lose_no_file_over_init_branch_and_resume(here, texts, own, public, transformers):
    if own:  # as Llama 2 was first published: with a tokenizer that is not read here
        public.pop("tokenizer.json"), Path("public/tokenizer.json").unlink()
    run(texts, "--init", "public", *own, "--data", "ids", *CHILD, "--out", "child")
    run(texts, "--branch", "child/step-2", "--tokens", 256, "--out", "branch")
    run(texts, "--init", "child", *CHILD[:-2], "--stack", 2, "--out", "grandchild")
    shutil.copytree("child/step-2", "resumed")
    run(texts, "--resume", "--out", "resumed")
    assert_same_run("child", "resumed")
    for folder in ("child", "child/step-2", "branch", "grandchild", "resumed"):
        assert_all_there(folder, public)
        assert checkpoint.read_json(f"{folder}/run.json")["tokenizer"] == (own[1] if own else "public")
    config = transformers.GenerationConfig.from_pretrained("grandchild")
    assert (config.temperature, config.eos_token_id) == (0.7, 0)
    assert transformers.AutoModelForCausalLM.from_pretrained("grandchild").config.num_hidden_layers == 2
    if not own:
        tokenizer, ids = transformers.AutoTokenizer.from_pretrained("grandchild"), np.fromfile("ids/train.bin", "<u2")
        assert tokenizer.chat_template == "{{ messages }}" and tokenizer.eos_token == "<|endoftext|>"
        assert tokenizer((texts / "a.txt").read_text()[:400])["input_ids"][:90] == ids[:90].tolist()


def test_a_tokenizer_that_is_given_takes_the_place_of_all_files_of_the_parents(here, texts, public, transformers):
    run(texts, "--init", "public", "--tokenizer", "bytes", "--data", texts / "a.txt", *CHILD, "--out", "child")
    bytes_alone = load_tokenizer("bytes").files
    for folder in ("child", "child/step-2"):
        files = {p.name for p in Path(folder).iterdir() if p.is_file()}
        assert {*bytes_alone, "LICENSE", "NOTICE.txt", "generation_config.json"} <= files
        assert not files & (public.keys() - bytes_alone.keys() - {"LICENSE", "NOTICE.txt", "generation_config.json",
                                                                  "config.json"})  # fmt: skip
        assert transformers.AutoTokenizer.from_pretrained(folder)("naïve")["input_ids"] == [*"naïve".encode()]
    assert load_tokenizer("child").key == "bytes"


def test_a_chat_template_that_is_edited_between_is_kept_by_a_resume(here, texts, public):
    run(texts, "--init", "public", "--data", texts / "a.txt", *CHILD, "--out", "child")
    Path("child/step-2/chat_template.jinja").write_text("newer")
    Path("public/chat_template.jinja").write_text("newer still, but not this run's")
    run(texts, "--resume", "--out", "child/step-2")
    assert Path("child/step-2/chat_template.jinja").read_text() == "newer"


# ---- terminals ------------------------------------------------------------------------------------------------------


def test_a_terminal_that_cannot_print_a_text_or_a_name_ends_no_command(here, texts):
    Path("wörter.txt").write_text("naïve Ωμέγα 日本 ∃ \U0001f600\n" * 600, encoding="utf-8")
    folder, name = r"o_$\x$ é", "日本"
    commands = {
        "data.py": [f"{name}=wörter.txt"],
        "train.py": [*TINY, "--data", f"{name}=wörter.txt", "--tokens", "1024", "--out", folder],
        "model.py": [folder, "--prompt", "naïve Ω", "--tokens", "9"],
        "runs.py": ["table", folder],
    }
    for i, (script, arguments) in enumerate(commands.items()):
        env = ENV | {"PYTHONIOENCODING": ("ascii", "cp1252")[i % 2]}
        done = subprocess.run([sys.executable, ROOT / script, *arguments], env=env, capture_output=True)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, (script, done.stderr[-2000:])
        assert b"?" in done.stdout
    assert Path(folder, "loss.png").stat().st_size > 5000
    assert f"{name}_loss" in table(Path(folder, "eval.csv"))[0]
    assert "naïve" in Path(folder, "samples.txt").read_text(encoding="utf-8")


def test_tables_of_a_run_are_utf_8_whatever_the_locale(here):
    write = "import runs, pathlib; p = pathlib.Path('t.csv'); c = [chr(26085) + '_loss']; "
    write += "runs.open_table(p, c, -1); runs.add_row(p, c, {c[0]: 1}); runs.open_table(p, c, 5)"
    env = ENV | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", write], env=env, check=True)
    assert Path("t.csv").read_text(encoding="utf-8").split() == ["日_loss", "1"]


def test_a_folder_whose_name_is_no_text_at_all_gets_its_plot(here):
    folder = Path("o_\udcff $\\x$")  # a byte that is not UTF-8, as the file system gives it
    folder.mkdir()
    (folder / "eval.csv").write_text("tokens,a_loss\n0,5.5\n256,4.5\n")
    (folder / "log.csv").write_text("tokens,loss\n32,5.4\n256,4.4\n")
    runs.plot(folder, {"a": [3.0, 2.0, 1.0]})
    assert (folder / "loss.png").stat().st_size > 5000


# ---- two processes, one folder --------------------------------------------------------------------------------------


def test_a_folder_that_another_process_writes_to_is_refused(here, texts, capsys):
    process = subprocess.Popen(command(texts, "--tokens", 256 * 4000, "--save-every", 1, "--out", "busy"), env=ENV,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    while not Path("busy/trainer.pt").exists():
        time.sleep(0.02)
    for again in (["--resume"], [*command(texts)[2:], "--overwrite"]):
        with pytest.raises(SystemExit):
            train.main([*again, "--out", "busy"])
        assert "busy is being written by another process" in capsys.readouterr().err
        assert Path("busy/trainer.pt").exists()
    process.kill()
    process.wait()


def test_a_run_that_went_on_before_it_was_locked_is_not_set_back(here, texts, monkeypatch, capsys):
    run(texts, *FEW, "--tokens", 256 * 4, "--save-at", 512, "--out", "whole")
    shutil.copytree("whole/step-2", "late")
    prepare, tables = train.prepare, Path("whole/log.csv").read_text()

    def slow(*args):  # meanwhile the process that was stopped saves, and ends
        for name in ("trainer.pt", "log.csv"):
            shutil.copyfile(f"whole/{name}", f"late/{name}.new")
            Path(f"late/{name}.new").replace(f"late/{name}")
        return prepare(*args)

    monkeypatch.setattr(train, "prepare", slow)
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", "late"])
    assert "late went on while this process began" in capsys.readouterr().err
    assert Path("late/log.csv").read_text() == tables


def test_a_snapshot_of_the_last_step_is_a_finished_run(here, texts, capsys):
    run(texts, *FEW, "--tokens", 512, "--save-at", 512, "--out", "whole")
    capsys.readouterr()
    assert train.main(["--resume", "--out", "whole/step-2"]) == 0
    assert "whole/step-2 is finished: 2 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main(["--branch", "whole/step-2", "--tokens", "256"])
    assert "its rate has decayed" in capsys.readouterr().err


def test_a_name_taken_since_it_was_checked_is_no_longer_free(here, texts, monkeypatch, capsys):
    prepare = train.prepare

    def slow(*args):  # meanwhile somebody else begins
        Path("out/run-1").mkdir(parents=True)
        Path("mine").mkdir()
        Path("mine/thesis.txt").write_text("years of work")
        return prepare(*args)

    monkeypatch.setattr(train, "prepare", slow)
    with pytest.raises(SystemExit):
        run(texts, "--tokens", 256, "--out", "mine")
    assert "mine" in capsys.readouterr().err and Path("mine/thesis.txt").exists()
    shutil.rmtree("mine")
    shutil.rmtree("out")
    run(texts, "--tokens", 256)
    assert Path("out/run-2/trainer.pt").exists() and not any(Path("out/run-1").iterdir())


def test_files_are_readable_by_whom_the_umask_allows(here, texts):
    run(texts, "--tokens", 256, "--out", "run")
    os.umask(mask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in Path("run").iterdir()} == {0o666 & ~mask}
