"""What a run is: each setting comes from where the table says, and what is wrong is said before any work starts."""

import contextlib
import copy
import io
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import horizon
import model
import settings
import train
from settings import FROM, KINDS, SHAPE

OWN = dict(
    optimizer="adamw", lr=1e-3, min_lr=1e-4, warmup=1, schedule="cosine", decay_fraction=0.5, weight_decay=0.2,
    grad_clip=0.5, seed=3, micro_batch=2, log_every=3, eval_every=2, save_every=2, eval_tokens=320, save_at="768",
    dtype="float32", hidden_size=32, num_hidden_layers=1, context=32, batch_tokens=256, tokens=1024, data="a.txt",
)  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with a run of four steps that has no setting at its default, and a snapshot of its third."""
    folder = tmp_path_factory.mktemp("settings")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        Path("a.txt").write_text(Path(random.__file__).read_text()[:20000])
        assert train.main([part for name, value in OWN.items() for part in (settings.flag(name), str(value))]
                          + ["--out", "trunk"]) == 0  # fmt: skip
    return folder


@pytest.fixture
def here(shelf, monkeypatch):
    monkeypatch.chdir(shelf)
    return shelf


def settle(*flags, world=1):
    args, given = settings.read_flags(settings.get_parser(), [str(f) for f in flags])
    return settings.settle(args, given, world)


def default(name):
    return settings.get_parser().get_default(name)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_names_every_flag_once_but_for_the_two_that_are_no_settings():
    named = [name for names in FROM for name in names]
    flags = vars(settings.get_parser().parse_args([]))
    assert sorted(named) == sorted(flags.keys() - {"overwrite", "resume"})
    words = {"flag", "parent", "folder", "either", "text"}
    assert all(len(ways) == len(KINDS) and {*ways} <= words for ways in FROM.values())


WORDS = {"router": "softmax-topk", "optimizer": "adamw", "schedule": "constant", "dtype": "bfloat16"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_comes_from_where_the_table_says(kind):

    def inherited(name, *flags):
        read = settings.read_flags(settings.get_parser(), flags)
        return getattr(settings.inherit(kind, *read, {name: "the parent's"}), name)

    switches = [action.dest for action in settings.get_parser()._actions if action.nargs == 0]
    for names, ways in FROM.items():
        for name in names:
            flags = [settings.flag(name)] + [WORDS.get(name, "7")] * (name not in switches)
            given = getattr(settings.get_parser().parse_args(flags), name)
            match ways[KINDS.index(kind)]:
                case "flag":
                    assert inherited(name, *flags) == given and inherited(name) == default(name)
                case "either":
                    assert inherited(name, *flags) == given and inherited(name) == "the parent's"
                case "parent" | "folder" | "text" as way:
                    assert inherited(name) == (default(name) if way == "folder" else "the parent's")
                    with pytest.raises(ValueError, match=f"{settings.flag(name)} .* cannot be given"):
                        inherited(name, *flags)


def test_a_new_run_has_its_flags_and_the_defaults(here):
    s = settle("--data", "a.txt", "--lr", 0.5).settings
    assert (s.data, s.lr, s.seed, s.schedule, s.tokens, s.context) == ("a.txt", 0.5, 1, "wsd", 2_000_000, 256)
    assert s.micro_batch is None and s.intermediate_size == 3 * s.hidden_size


def test_a_step_is_made_of_whole_windows(here):
    for context, tokens in ((48, 2016), (256, 2048), (3000, 3000)):
        assert settle("--data", "a.txt", "--context", context).settings.batch_tokens == tokens
    assert settle("--init", "trunk", "--context", 48).settings.batch_tokens == 2016
    with pytest.raises(ValueError, match="2048 is not a multiple of the context 48"):
        settle("--data", "a.txt", "--context", 48, "--batch-tokens", 2048)


def test_an_init_takes_the_shape_from_the_folder_the_text_from_the_parent_and_a_new_optimizer(here):
    start = settle("--init", "trunk")
    s = start.settings
    assert (s.hidden_size, s.num_hidden_layers, start.config.hidden_size) == (32, 1, 32)
    assert (s.data, s.tokenizer, s.context) == ("a.txt", "bytes", 32)
    for name in ("optimizer", "lr", "min_lr", "warmup", "schedule", "decay_fraction", "weight_decay", "grad_clip",
                 "seed", "dtype", "batch_tokens", "micro_batch", "log_every", "eval_every", "eval_tokens",
                 "save_at"):  # fmt: skip
        assert getattr(s, name) == default(name) != OWN[name], name
    assert s.tokens == 2_000_000 and start.state is None
    assert settle("--init", "trunk", "--context", 64).settings.context == 64


def test_a_branch_keeps_optimizer_data_and_seed_and_decays_from_the_rate_of_that_step(here):
    start = settle("--branch", "trunk/step-3", "--tokens", 512)
    s, rate = start.settings, checkpoint.read_trainer("trunk/step-3")["lr"]
    for name in ("data", "context", "batch_tokens", "optimizer", "weight_decay", "grad_clip", "seed", "micro_batch",
                 "dtype"):  # fmt: skip
        assert getattr(s, name) == OWN[name], name
    assert OWN["min_lr"] < s.lr == rate < OWN["lr"]  # the cosine has come down some way
    assert (s.schedule, s.warmup, s.decay_fraction, s.min_lr, s.tokens) == ("wsd", 0, 1.0, 0.0, 512)
    for name in ("log_every", "eval_every", "eval_tokens", "save_at", "fsdp"):
        assert getattr(s, name) == default(name), name
    assert start.state["step"] == 3


def test_a_resume_keeps_everything_but_machine_and_rhythm(here):
    start = settle("--resume", "--out", "trunk/step-3", "--log-every", 1, "--micro-batch", 4, "--device", "cpu")
    s = start.settings
    for name, value in OWN.items():
        if name not in ("log_every", "micro_batch", "save_at"):
            assert getattr(s, name) == value, name
    assert (s.log_every, s.micro_batch, s.device, s.save_at, s.out) == (1, 4, "cpu", [768], "trunk/step-3")
    assert settle("--resume", "--out", "trunk", "--lr", OWN["lr"]).settings.lr == OWN["lr"]  # the same again is fine
    auto = settle("--resume", "--out", "trunk", "--lr", "auto", "--dtype", "auto").settings
    assert (auto.lr, auto.dtype) == (OWN["lr"], settle("--resume", "--out", "trunk").settings.dtype)
    with pytest.raises(ValueError, match="--lr auto cannot be given"):
        settle("--branch", "trunk/step-3", "--lr", "auto")


# ---- folders of an older program ------------------------------------------------------------------------------------


def without(folder, target, *names):
    """A copy of the folder, as a program that did not know these settings would have left it."""
    shutil.copytree(folder, target)
    state = checkpoint.read_trainer(target)
    for known in (state["settings"], state["run"]["lineage"][-1]["settings"]):
        for name in names:
            del known[name]
    state = {**state, "weights": {n: t.clone() for n, t in state["weights"].items()}}
    torch.save(state, f"{target}/trainer.new")
    Path(f"{target}/trainer.new").replace(f"{target}/trainer.pt")
    checkpoint.write_json(Path(target, "run.json"), state["run"])


@pytest.mark.parametrize("kind", ["branch", "resume"])
def test_a_setting_that_an_older_folder_lacks_takes_the_default_of_its_flag(kind, here, tmp_path):
    inherited = [name for names, ways in FROM.items() for name in names if ways[KINDS.index(kind)] in
                 ("parent", "either") and name not in SHAPE]  # fmt: skip
    names = [n for n in inherited if n in OWN and n not in settings.BEFORE and default(n) is not None]
    assert {"weight_decay", "grad_clip", "seed", "batch_tokens", "dtype"} <= {*names}
    branch = {"lr", "schedule", "decay_fraction"}  # a branch has its own
    without("trunk/step-3", tmp_path / "old", *names, "z_coef", "balance_coef", "warmup", "micro_batch", "mask_steps")
    s = settle(*(["--branch", tmp_path / "old"] if kind == "branch" else ["--resume", "--out", tmp_path / "old"]))
    for name in {*names} - (branch if kind == "branch" else set()):
        assert getattr(s.settings, name) == default(name) != OWN[name], name
    assert s.settings.micro_batch is None
    with pytest.raises(ValueError, match=f"--z-coef 0.5 .* the run has {default('z_coef')}"):
        settle(*(["--branch"] if kind == "branch" else ["--resume", "--out"]), tmp_path / "old", "--z-coef", 0.5)


def test_a_run_goes_on_from_an_older_folder(here, tmp_path, capsys):
    without("trunk/step-3", tmp_path / "old", "z_coef", "balance_coef", "grad_clip", "micro_batch", "eval_tokens")
    flags = ["--branch", str(tmp_path / "old"), "--tokens", "256", "--out", str(tmp_path / "branch")]
    assert train.main(flags) == 0
    assert train.main(["--resume", "--out", str(tmp_path / "old")]) == 0
    assert checkpoint.read_trainer(tmp_path / "old")["step"] == 4
    assert checkpoint.read_trainer(tmp_path / "branch")["settings"]["grad_clip"] == default("grad_clip")


def test_a_run_from_before_there_was_a_choice_of_optimizers_goes_on_with_adamw(here, tmp_path):
    old, branch = str(tmp_path / "old"), str(tmp_path / "branch")
    without("trunk/step-3", old, "optimizer")
    for optimizer in ("muon", "adamw"):
        with pytest.raises(ValueError, match="--optimizer .* the run has adamw .a branch keeps"):
            settle("--branch", old, "--tokens", 256, "--optimizer", optimizer)
    with pytest.raises(ValueError, match="--optimizer muon cannot be given: the run has adamw .a resumed run keeps"):
        settle("--resume", "--out", old, "--optimizer", "muon")
    assert train.main(["--branch", old, "--tokens", "256", "--out", branch]) == 0
    assert train.main(["--resume", "--out", old, "--optimizer", "adamw"]) == 0
    resumed, branched, calm = (checkpoint.read_trainer(folder) for folder in (old, branch, "trunk"))
    assert all(torch.equal(t, calm["weights"][n]) for n, t in resumed["weights"].items())
    for state in (resumed, branched):
        assert state["settings"]["optimizer"] == "adamw"
        assert all(kept.keys() == {"exp_avg", "exp_avg_sq", "step"} for kept in state["optimizer"].values())
        assert {kept["step"].item() for kept in state["optimizer"].values()} == {4.0}
    assert settle("--init", old).settings.optimizer == "muon"  # a new optimizer


# ---- checks ---------------------------------------------------------------------------------------------------------


def test_what_was_inherited_is_checked_after_it_was_inherited(here):
    rate = checkpoint.read_trainer("trunk/step-3")["lr"]
    with pytest.raises(ValueError, match=f"--lr is {rate} and --min-lr 0.002"):
        settle("--branch", "trunk/step-3", "--min-lr", 0.002)  # below the default of --lr, above the trunk's rate
    assert settle("--branch", "trunk/step-3", "--min-lr", rate).settings.min_lr == rate


@pytest.mark.parametrize("flags", ["--data a.txt", "--init trunk", "--branch trunk/step-3", "--resume --out trunk"])
def test_the_parsed_flags_stay_as_they_were_given(flags, here):
    args, given = settings.read_flags(settings.get_parser(), flags.split())
    before = copy.deepcopy((vars(args), given))
    start = settings.settle(args, given, 1)
    module = model.Transformer(start.config)
    sizes, flops = module.num_parameters(), module.flops_per_token(start.settings.context)
    horizon.complete(start.settings, start.config, sizes, flops, torch.device("cpu"), 1)
    assert (vars(args), given) == before


@pytest.mark.parametrize("steps, evaluations", [(1, 1), (7, 1), (128, 1), (511, 1), (512, 2), (1221, 4), (10000, 10)])
def test_evaluations_cost_a_small_part_of_a_run_of_any_length(steps, evaluations, here):
    """An evaluation reads 131,072 tokens, as 64 steps do: at a third of their cost."""
    start = settle("--data", "a.txt", "--tokens", steps * 2048)
    sizes = model.Transformer(start.config).num_parameters()
    assert horizon.complete(start.settings, start.config, sizes, 1, torch.device("cpu"), 1)[0] == steps
    every, save = start.settings.eval_every, start.settings.save_every
    assert len({*range(every, steps, every), steps}) == evaluations
    assert min(steps, 5) <= len({*range(save, steps, save), steps}) <= 10


def test_a_small_model_under_adamw_gets_a_rate_of_six_thousandths_at_most():
    assert horizon.auto_lr("adamw", 3e4, 1e6, 500) == 0.006
    assert horizon.auto_lr("adamw", 1e8, 1e9, 500) == pytest.approx(1.79 / 4 * 1e8**-0.713 * 1e9**0.307, rel=0.01)


def test_the_automatic_rate_of_a_run_that_goes_on_falls_with_its_share_of_the_whole_way():
    def rate(steps, *tokens):
        return horizon.continued_lr("muon", 1e6, 2048, steps, [{"step": "train", "tokens": t} for t in tokens])

    alone = lambda steps: horizon.auto_lr("muon", 1e6, 2048 * steps, steps)
    assert rate(100) == alone(100)
    assert rate(100, 2048 * 300) == rate(100, 2048 * 100, 2048 * 200) == pytest.approx(alone(400) / 2)
    assert rate(100, 2e12) == rate(100, None) == rate(100, None, 2048) == pytest.approx(alone(1000) / 10**0.5)
    adamw = horizon.continued_lr("adamw", 1e6, 2048, 100, [{"step": "upcycle"}, {"step": "train", "tokens": 204800}])
    assert adamw == pytest.approx(horizon.auto_lr("adamw", 1e6, 409600, 200) / 2**0.5)


def test_a_run_that_goes_on_has_a_lower_automatic_rate_than_a_new_one(here):
    rates = []
    for flags in (("--data", "a.txt"), ("--init", "trunk")):
        start = settle(*flags, "--tokens", 1024, "--batch-tokens", 256)
        sizes = model.Transformer(start.config).num_parameters()
        horizon.complete(start.settings, start.config, sizes, 1, torch.device("cpu"), 1, start.lineage)
        of = horizon.continued_lr("muon", sizes["N_active"], 256, 4, start.lineage)
        assert start.settings.lr == pytest.approx(of, rel=0.05)
        rates.append(start.settings.lr)
    assert rates[1] < 0.9 * rates[0]


BATCHES = {  # windows of a step, ranks, micro-batch before -> the largest one after that divides and is no larger
    (8, 1, 8): 8, (8, 2, 8): 4, (8, 8, 8): 1, (8, 2, 2): 2, (8, 1, 2): 2, (12, 2, 4): 3, (12, 1, 8): 6, (14, 2, 5): 1,
}  # fmt: skip


@pytest.mark.parametrize("windows, world, before", BATCHES)
def test_a_stored_micro_batch_is_fitted_to_the_ranks(windows, world, before):
    s = SimpleNamespace(batch_tokens=windows * 32, context=32, micro_batch=before, fsdp=False)
    settings.check_batch(s, world, fit=True)
    assert s.micro_batch == BATCHES[windows, world, before]


def test_ranks_that_do_not_divide_the_windows_and_a_micro_batch_that_does_not_are_refused(here):
    for flags in (["--data", "a.txt", "--context", 32, "--batch-tokens", 256], ["--resume", "--out", "trunk"]):
        with pytest.raises(ValueError, match=r"8 windows a step cannot be shared by 3 ranks \(a divisor of 8\)"):
            settle(*flags, world=3)
        with pytest.raises(ValueError, match=r"--micro-batch 3 does not divide the 4 windows of a rank \(a divisor of"):
            settle(*flags, "--micro-batch", 3, world=2)
        with pytest.raises(ValueError, match="--micro-batch 8 does not divide the 4 windows"):
            settle(*flags, "--micro-batch", 8, world=2)
    with pytest.raises(ValueError, match="--fsdp shards over ranks, and there is one"):
        settle("--resume", "--out", "trunk", "--fsdp")


@pytest.mark.parametrize("name", ["micro_batch", "log_every", "eval_every", "save_every"])
def test_what_may_change_in_a_resume_is_checked_there_too(name, here):
    with pytest.raises(ValueError, match=rf"{settings.flag(name)} is 0 \(at least 1\)"):
        settle("--resume", "--out", "trunk", settings.flag(name), 0)


def test_overwrite_deletes_a_run_and_nothing_else(here, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for folder in ("step-3", "step-6.partial"):
        (run / folder).mkdir(parents=True)
    (run / "log.csv").write_text("step\n")
    anew = ("--out", run, "--overwrite")
    settle("--data", "a.txt", *anew)
    monkeypatch.chdir(run / "step-3")
    with pytest.raises(ValueError, match="would delete .*/step-3 .the parent, what it reads"):
        settle(*anew)
    monkeypatch.undo()
    (run / "a.txt").write_text("text " * 100)
    for flags in (["--data", run / "a.txt"], ["--data", f"{run}/*.txt"], ["--tokenizer", run / "a.txt"]):
        with pytest.raises(ValueError, match="would delete .*/run/a.txt .the parent, what it reads"):
            settle(*flags, *anew)
    (run / ".git").mkdir()
    with pytest.raises(ValueError, match="would delete .*/run/.git .the parent, what it reads"):
        settle(*anew)


def test_a_resume_overwrites_nothing(here):
    with pytest.raises(ValueError, match="--overwrite would delete the run that --resume goes on with"):
        settle("--resume", "--out", "trunk", "--overwrite")


def test_a_run_within_its_mask_is_not_sharded_by_a_resume(here, tmp_path):
    shutil.copytree("trunk/step-3", tmp_path / "masked")
    state = checkpoint.read_trainer("trunk/step-3")
    for mask_steps, words in ((4, "--mask-steps and --fsdp cannot go together"), (3, None)):
        state["settings"]["mask_steps"] = mask_steps
        torch.save(state, tmp_path / "masked/trainer.pt")
        refused = pytest.raises(ValueError, match=words) if words else contextlib.nullcontext()  # open at step 3
        with refused:
            settle("--resume", "--out", tmp_path / "masked", "--fsdp", world=2)


def test_other_ranks_or_another_micro_batch_are_told(here):
    state = {"settings": {"micro_batch": 4}, "ranks": 1}
    dense, mixture = model.Config(), model.Config(experts=4, top_k=2)
    told = lambda config, micro, world: settings.told_apart(state, SimpleNamespace(micro_batch=micro), config, world)
    assert told(dense, 4, 1) == told(mixture, 4, 1) == []
    for config, micro, world in ((dense, 2, 1), (dense, 4, 2), (mixture, 4, 2)):
        assert "rounding errors" in told(config, micro, world)[0]
    assert "balancing loss" in told(mixture, 2, 2)[0]
