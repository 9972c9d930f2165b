"""What a run is: the flags of train.py, and what each setting comes from.

A run starts in one of four ways. It can be new, start from a checkpoint (--init), leave another run, the trunk, before
its rate decays (--branch), or go on after an interruption (--resume). This table says where everything comes from:

                        new          --init               --branch            --resume
    weights             drawn        the folder's         the folder's        the run's
    optimizer           zeros        zeros                the folder's        the run's
    step, seconds       0            0                    0                   the run's
    place in the text   beginning    where the lineage stopped                the run's
    settings            the table `FROM` below, a row for each group of flags

The lineage is the list of steps (trainings, upcycling, growth) that made a checkpoint.

`settle` follows the table. It reads configurations and headers, so that what flags and folders can tell is found before
any work starts. It opens no tensors, no text and no device: train.py does, and builds the model from what settle
returns. What depends on the device and on the length of the run is filled in after that, by horizon.py. `settle` checks
the flags against each other, then the folders that they name, and at the end the settings as they were settled: what is
inherited can be as wrong as what is typed. What it returns, a `Start`, is new; the parsed flags stay as they were.

A setting that an older folder does not know takes its default, or its value in `BEFORE` if that was another. So a new
flag needs a line in `get_parser`, and a word in `FROM` which says where a child gets it from.
"""

import argparse
import math
import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import checkpoint
import data
import grow
import horizon
import model
import upcycle
from checkpoint import last_settings, read_config, read_lineage, read_trainer, reader
from tables import Parser
from tokenizer import load_tokenizer

KINDS = ("new", "init", "branch", "resume")
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "qk_norm", "tie_word_embeddings", "rope_theta", "experts", "top_k", "granularity", "router",
)  # fmt: skip
FROM = {  # flags: where their values come from in a run that is new, --init, --branch, --resume
    # flag: given, or its default       either: given, or else the parent's
    # folder: from config.json; giving it is an error (but --upcycle takes --granularity and --router)
    # parent: the parent's; giving it is an error (but --resume lets an equal value pass, or auto)
    # text: the parent's; giving it may only say where that lies now
    SHAPE: ("flag", "folder", "folder", "parent"),
    ("data",): ("flag", "either", "text", "text"),
    ("tokenizer", "context"): ("flag", "either", "parent", "parent"),
    ("batch_tokens", "optimizer", "lr", "warmup", "schedule", "decay_fraction", "weight_decay", "grad_clip", "z_coef",
     "capacity_factor", "seed"): ("flag", "flag", "parent", "parent"),  # but a branch decays: see settle
    ("balance_coef",): ("flag", "either", "parent", "parent"),  # --init: config.json's
    ("tokens", "flops", "tokens_per_param", "min_lr"): ("flag", "flag", "flag", "parent"),
    ("init", "branch", "source_tokens", "upcycle", "stack", "mask_steps"): ("flag", "flag", "flag", "parent"),
    ("eval_tokens", "save_at"): ("flag", "flag", "flag", "parent"),
    ("dtype",): ("flag", "flag", "either", "parent"),
    ("micro_batch",): ("flag", "flag", "either", "either"),
    ("log_every", "eval_every", "save_every"): ("flag", "flag", "flag", "either"),
    ("out", "device", "compile", "fsdp", "checkpoint_blocks"): ("flag", "flag", "flag", "flag"),
}  # fmt: skip
BEFORE = {"optimizer": "adamw"}  # of a run that is older than the flag
MIXTURE = ("top_k", "granularity", "router", "capacity_factor", "balance_coef", "z_coef")  # no use to a dense model


class Start(NamedTuple):
    """What a run begins with. `settings` has an attribute for each flag in FROM, settled but for the device."""

    kind: str  # of KINDS
    settings: SimpleNamespace
    config: model.Config
    tokenizer: object
    lineage: list  # the steps before this run; of a resumed run its own is the last
    state: dict | None  # trainer.pt of the resumed run, or of the trunk
    operators: list  # applied to the checkpoint of --init, one after the other
    besides: list  # files of the parent that go along: chat template, generation settings, licence


# ---- the flags ------------------------------------------------------------------------------------------------------


def number(text):
    """A count as people write it: 1e6, 2_000_000, 0."""
    value = float(text)
    if not (value >= 0 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text} is not a count (a whole number, as in 4096, 1e6 or 2_000_000)")
    return int(value)


def positive(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range (0 or more)")
    return value


def rate(text):
    return text if text == "auto" else positive(text)


def counts(text):
    return [number(part) for part in text.split(",")]


class Help(argparse.RawDescriptionHelpFormatter):
    """One line a flag, with its unit; a default that the help line does not say is added."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34)

    def _get_default_metavar_for_optional(self, action):
        return {number: "N", positive: "X"}.get(action.type, "NAME")

    def _get_help_string(self, action):
        silent = "default:" in action.help or action.default in (None, argparse.SUPPRESS) or action.const is True
        return action.help if silent else f"{action.help} (default: %(default)s)"


def get_parser(commands=""):
    """The parser of train.py. commands: the text that its help opens with."""
    usage = "train.py [--out FOLDER] [--tokens N] [--data SPEC] [shape, optimisation, machine flags: see --help]"
    parser = Parser("train.py", usage, commands, formatter_class=Help)
    c, switch = model.Config, argparse.BooleanOptionalAction

    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder of the run (default: the next free out/run-N)")
    add("--overwrite", action="store_true", help="delete the run that --out holds, and start anew")
    add("--resume", action="store_true", help="go on with the run in --out, with the settings stored there")
    add("--init", metavar="FOLDER", help="start from this checkpoint's weights (or a public model's, ORG/NAME)")
    add("--branch", metavar="FOLDER", help="go on from this run or snapshot, optimizer included, and only decay")
    add("--source-tokens", type=number, help="tokens that the public checkpoint of --init has seen (default: unknown)")

    add = parser.add_argument_group("data").add_argument
    add("--data", help="corpora, [name=]source[:weight],...: see data.py (default: python, or the parent's)")
    add("--tokenizer", help="bytes, a tiktoken name, a rank file or a tokenizer.json (default: bytes, or the parent's)")
    add("--context", type=number, help="tokens in a window (default: 256, or the parent's)")
    add("--batch-tokens", type=number, default=2048, help="tokens of one step over all ranks, whole windows")
    add("--micro-batch", type=number, help="windows a rank takes at once (default: from shape and kind of device)")

    add = parser.add_argument_group("horizon: one of").add_argument
    add("--tokens", type=number, help="tokens of this run; 0 only evaluates and writes nothing (default: 2e6)")
    add("--flops", type=positive, help="training FLOPs to spend")
    add("--tokens-per-param", type=positive, help="tokens a parameter of N_active")

    add = parser.add_argument_group("shape (of a new model)").add_argument
    add("--hidden-size", type=number, default=c.hidden_size, help="width of the residual stream")
    add("--intermediate-size", type=number, help="width of the MLP or of a full expert (default: 3 x hidden size)")
    add("--num-hidden-layers", type=number, default=c.num_hidden_layers, help="blocks")
    add("--num-attention-heads", type=number, help="query heads (default: hidden size / 64, at least 2)")
    add("--num-key-value-heads", type=number, help="key and value heads; fewer: grouped queries (default: heads)")
    add("--head-dim", type=number, help="width of a head, even (default: hidden size / heads)")
    add("--qk-norm", action=switch, default=c.qk_norm, help="norm of queries and keys")
    add("--tie-word-embeddings", action=switch, default=c.tie_word_embeddings, help="one matrix as embedding and head")
    add("--rope-theta", type=positive, default=c.rope_theta, help="base of the rotary frequencies")
    add("--experts", type=number, default=c.experts, help="full-width experts, E; 0 is a dense model")
    add("--top-k", type=number, default=c.top_k, help="full-width experts a token")
    add("--granularity", type=number, default=c.granularity, help="experts that a full one is split into, G")
    add("--router", choices=model.moe.ROUTERS, default=c.router, help="order of softmax and top-k")
    add("--capacity-factor", type=positive, help="even shares of tokens that an expert takes (default: drop nothing)")

    add = parser.add_argument_group("reuse (of the checkpoint of --init, in memory on every rank)").add_argument
    add("--upcycle", metavar="ExK", help="make its MLPs experts, as in 8x2: see upcycle.py (default: leave it dense)")
    add("--stack", type=number, help="repeat its layers so many times: see grow.py (default: leave them)")
    add("--mask-steps", type=number, metavar="STEPS", help="open the mask of grow.py's random in so many steps")

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of hidden matrices; adamw has all others")
    add("--lr", type=rate, default="auto", metavar="X", help="highest learning rate; auto: see horizon.py")
    add("--min-lr", type=positive, default=0.0, help="learning rate at the end")
    add("--warmup", type=number, help="steps of linear warmup (default: 2%% of the run)")
    schedules = ("cosine", "wsd", "constant")
    add("--schedule", choices=schedules, default="wsd", help="of the rate; wsd is constant, then linear decay")
    add("--decay-fraction", type=positive, default=0.25, help="share of the run in which wsd decays")
    add("--weight-decay", type=positive, default=0.1, help="of matrices, a step and unit of rate")
    add("--grad-clip", type=positive, default=1.0, help="largest norm of the gradient; 0 does not clip")
    add("--balance-coef", type=positive, default=c.balance_coef, help="weight of the MoE balancing loss")
    add("--z-coef", type=positive, default=0.001, help="weight of the MoE router's z-loss")
    add("--seed", type=number, default=1, help="of new weights, and of the text's order in a lineage's first run")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (CUDA, else the CPU), cpu, cuda, or mps (Apple's; not tried)")
    dtypes = ("auto", "float32", "bfloat16")
    add("--dtype", choices=dtypes, default="auto", help="of the products; auto is bfloat16 where it is fast")
    add("--compile", action=switch, help="torch.compile each block (default: on CUDA only)")
    add("--fsdp", action="store_true", help="shard parameters, gradients and optimizer over the ranks")

    add("--checkpoint-blocks", action=switch, help="compute each block again in the backward pass, in the place of "
        "keeping its activations (default: under --fsdp only)")

    add = parser.add_argument_group("rhythm").add_argument
    add("--log-every", type=number, default=10, help="steps between two rows of log.csv")
    add("--eval-every", type=number, help="steps between evaluations (default: what costs a twelfth of the run)")
    add("--eval-tokens", type=number, default=data.EVAL_TOKENS, help="tokens of a corpus to evaluate at most")
    add("--save-every", type=number, help="steps between checkpoints (default: a tenth of the run)")
    add("--save-at", type=counts, action="extend", default=[], metavar="TOKENS,...",
        help="keep snapshots in OUT/step-N (default: none)")
    return parser


def read_flags(parser, argv):
    """argv -> (args with every default, the dict of what was really given)."""
    args = parser.parse_args(argv)  # once more, onto Nones, which argparse does not replace: the rest was given
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args)))))
    return args, {k: v for k, v in given.items() if v is not None}


# ---- what comes from where ------------------------------------------------------------------------------------------


def flag(name):
    return "--" + name.replace("_", "-")


def settle(args, given, world):
    """Flags and the folders they name -> Start. world: number of ranks. Raises ValueError or FileNotFoundError."""
    kind = next((k for k in ("resume", "branch", "init") if getattr(args, k)), "new")
    check_flags(kind, args, given)
    folder, config, lineage, state, named = read_parent(kind, args)
    operators, besides = [], []
    stored = state["settings"] if state else last_settings(lineage)
    s = inherit(kind, args, given, stored)
    match kind:
        case "new":
            tokenizer = load_tokenizer(s.tokenizer or "bytes")
            config = new_config(s, tokenizer)
        case "init":
            operators, config, lineage = reshape(folder, config, lineage, s, given)
            s.context = s.context or min(config.max_position_embeddings, 1024)  # a public model's can be huge
        case "branch":
            s.schedule, s.warmup, s.decay_fraction, s.lr = "wsd", 0, 1.0, state["lr"]  # down from the trunk's last rate
            if state["finished"] and stored.get("schedule") != "constant":
                right = "a snapshot from before, or --init"
                raise ValueError(f"--branch {folder}: this run is at its end, and its rate has decayed ({right})")
            if state["step"] < (stored.get("mask_steps") or 0):
                raise ValueError(f"--branch {folder}: its mask is not open yet (a later snapshot)")
    if kind != "new":
        # given, or that in the folder; a run on ready tokens has none of its own, but a name such as ids:32000
        parents = stored.get("tokenizer") or ""
        tokenizer = load_tokenizer(given.get("tokenizer") or (parents if parents.startswith("ids:") else str(folder)))
        tokenizer.name = given.get("tokenizer") or named or tokenizer.name
    if kind in ("init", "branch"):
        besides = checkpoint.besides(folder, tokenizer="tokenizer" not in given or not tokenizer.files)
    if kind != "resume":
        finish(kind, s, given, config, tokenizer)
    find_text(s.data, moved=state is not None)
    step = state["step"] if kind == "resume" else 0
    if s.fsdp and step < (s.mask_steps or 0):
        raise ValueError("--mask-steps and --fsdp cannot go together (the mask needs whole weights: DDP)")
    if kind in ("new", "init") and "batch_tokens" not in given:
        s.batch_tokens = max(1, s.batch_tokens // s.context) * s.context
    check_batch(s, world, fit="micro_batch" not in given)
    return Start(kind, s, config, tokenizer, lineage, state, operators, besides)


def read_parent(kind, args):
    """(folder, Config, lineage, what trainer.pt holds, name of the tokenizer) of what the run goes on from."""
    if kind == "new":
        return None, None, [], None, None
    if kind == "resume":
        state = read_trainer(args.out)
        run = state["run"]
        return args.out, model.Config(**state["config"]), run["lineage"], state, run["tokenizer"]
    folder = checkpoint.find(args.init or args.branch)
    config = read_config(folder)
    state = read_trainer(folder) if kind == "branch" else None
    reader(folder, config)  # headers only: what is missing or torn is said now
    named, lineage = read_lineage(folder, args.source_tokens)
    return folder, config, lineage, state, named


def inherit(kind, args, given, stored):
    """The settings that the table FROM gives: from the flags `args`, or from `stored`, the parent's own settings."""
    s, defaults = SimpleNamespace(), vars(get_parser().parse_args([])) | BEFORE
    upcycling = ("granularity", "router") if args.upcycle else ()  # of the new experts
    for names, ways in FROM.items():
        for name in names:
            way = ways[KINDS.index(kind)]
            value = getattr(args, name)
            before = stored.get(name, defaults[name])
            if way == "text":  # that it is the same to the byte is checked when it is read
                way = "either" if name in given and data.same_corpora(value, before) else "parent"
            same = given.get(name) in (before, "auto")  # what auto was, the run knows
            if way == "parent" and name in given and (kind == "branch" or not same):
                keeps = {"branch": "a branch keeps data, optimizer, seed and rate", "resume": "a resumed run keeps all"}
                raise ValueError(f"{flag(name)} {value} cannot be given: the run has {before} ({keeps[kind]})")
            if way == "folder" and name in given and name not in upcycling:
                raise ValueError(f"{flag(name)} {value} cannot be given with a parent (its folder says the shape)")
            # way "folder": `finish` puts in what config.json says
            inherits = way == "parent" or (way == "either" and name not in given)
            setattr(s, name, before if inherits else value)
    return s


def new_config(s, tokenizer):
    """The Config of a new model; fills in the sizes that follow from others."""
    D = s.hidden_size
    s.intermediate_size = s.intermediate_size or 3 * D
    s.num_attention_heads = s.num_attention_heads or max(2, D // 64)
    s.num_key_value_heads = s.num_key_value_heads or s.num_attention_heads
    if not s.head_dim and D % s.num_attention_heads:
        heads = s.num_attention_heads
        raise ValueError(f"{heads} heads do not divide the hidden size {D} (a divisor, or --head-dim)")
    s.head_dim = s.head_dim or D // s.num_attention_heads
    s.context = s.context or 256
    shape = {name: getattr(s, name) for name in SHAPE}
    return model.Config(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eot, **shape)


def reshape(folder, config, lineage, s, given):
    """What --upcycle and --stack make of the checkpoint of --init: (operators, Config, lineage)."""
    operators, closed = [], checkpoint.closed_mask(lineage)
    if s.stack is not None and s.stack < 2:
        raise ValueError(f"--stack {s.stack} adds no layer (2 or more)")
    if closed and (s.upcycle or s.stack):
        raise ValueError(f"{folder} has a closed mask, and --upcycle or --stack would lose it (first --mask-steps N)")
    if s.upcycle:
        experts, top_k = upcycle.parse(s.upcycle)
        recipe = {name: given[name] for name in ("granularity", "router") if name in given}
        operators.append(upcycle.operator(config, experts, top_k, seed=s.seed, **recipe))
    if s.stack is not None:
        before = operators[-1].config if operators else config
        operators.append(grow.growth(before, factor=s.stack, seed=s.seed))
    for operator in operators:
        config, lineage = operator.config, [*lineage, operator.entry]
    if s.mask_steps and not closed:
        raise ValueError(f"--mask-steps: {folder} has no mask (grow.py --operator random makes one)")
    if closed and not s.mask_steps and s.tokens != 0:
        raise ValueError(f"{folder} has a closed mask, behind which nothing learns (--mask-steps N opens it)")
    return operators, config, lineage


def finish(kind, s, given, config, tokenizer):
    """Completes Config and settings from each other, then checks both."""
    if not config.experts:
        for name in MIXTURE:
            if name in given:
                right = "--upcycle" if kind == "init" else "--experts"
                raise ValueError(f"{flag(name)} {given[name]} is for a mixture of experts (add {right})")
    if kind == "init" and "balance_coef" not in given:
        s.balance_coef = config.balance_coef
    config.balance_coef = s.balance_coef
    config.capacity_factor = s.capacity_factor if config.experts else None
    config.max_position_embeddings = s.context if kind == "new" else max(config.max_position_embeddings, s.context)
    config.check()
    checkpoint.public_config(config, torch.float32)  # a shape that no format can say is refused before it is trained
    for field in fields(config):
        if field.name in SHAPE:
            setattr(s, field.name, getattr(config, field.name))
    checkpoint.check_ids(tokenizer, config)
    s.data, s.tokenizer = s.data or "python", tokenizer.name
    if (s.tokens, s.flops, s.tokens_per_param) == (None, None, None):
        s.tokens = 2_000_000
    if s.lr != "auto":  # here and not in check_flags: a branch has the trunk's lr
        horizon.check_rate(s)


def find_text(spec, moved):
    """Raises ValueError or FileNotFoundError for text that is not there. moved: name the way out of a run that goes on,
    whose text was there once."""
    try:
        data.parse_spec(spec)
    except FileNotFoundError as lost:
        raise FileNotFoundError(f"{lost}" + "; if it has moved, --data says where it is now" * moved) from None


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_flags(kind, args, given):
    """What can be said without opening a folder."""
    for name in ("batch_tokens", "micro_batch", "context", "log_every", "eval_every", "eval_tokens", "save_every"):
        if getattr(args, name) == 0:
            raise ValueError(f"{flag(name)} is 0 (at least 1)")
    if kind == "resume":
        if not args.out:
            raise ValueError("--resume needs --out (the folder of the run)")
        if args.overwrite:
            raise ValueError("--overwrite would delete the run that --resume goes on with (one of them)")
        return
    if args.init and args.branch:
        raise ValueError("--init and --branch cannot go together (one parent)")
    horizons = [name for name in ("tokens", "flops", "tokens_per_param") if name in given]
    if len(horizons) > 1:
        raise ValueError(f"{flag(horizons[0])} and {flag(horizons[1])} are two horizons (one of them)")
    out = Path(args.out or "out/run")
    ground = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if args.tokens != 0 and not (ground.is_dir() and os.access(ground, os.W_OK)):  # 0 writes nothing
        raise ValueError(f"--out {out}: nothing can be made in {ground} (a folder that can be written)")
    if args.out and out.exists():
        if not args.overwrite:
            raise ValueError(f"--out {out} exists (another name, --resume to go on with it, --overwrite to delete it)")
        check_overwrite(out, args)
    for name in ("source_tokens", "upcycle", "stack", "mask_steps"):
        if getattr(args, name) and kind != "init":
            raise ValueError(f"{flag(name)} is about the checkpoint of --init (add --init)")
    if not 0 < args.decay_fraction <= 1:
        raise ValueError(f"--decay-fraction is {args.decay_fraction} (above 0 and at most 1)")


def check_overwrite(out, args):
    """Raises ValueError if --overwrite would delete more than a run."""
    if not out.is_dir() or (any(out.iterdir()) and not (out / "log.csv").exists()):
        raise ValueError(f"--overwrite: {out} is not a folder of train.py (delete it yourself)")
    used = [file for *_, files in data.parse_spec(args.data) for _, file in files] if args.data else []
    paths = [Path(path).resolve() for path in (Path.cwd(), args.init, args.branch, args.tokenizer, *used) if path]
    inside = [path for path in paths if out.resolve() in (path, *path.parents)]
    inside += [path for path in out.iterdir() if path.is_dir() and not path.name.startswith("step-")]
    if inside:
        raise ValueError(f"--overwrite would delete {inside[0]} (the parent, what it reads, where you are, or no run)")


def check_batch(s, world, fit):
    """Raises ValueError if a step does not divide into windows, ranks and micro-batches. With `fit` an inherited
    micro-batch is cut to a divisor: the number of ranks may have changed."""
    if s.batch_tokens % s.context:
        raise ValueError(f"--batch-tokens {s.batch_tokens} is not a multiple of the context {s.context}")
    windows, share = s.batch_tokens // s.context, s.batch_tokens // s.context // world  # of a step, of a rank in it
    if s.fsdp and world == 1:
        raise ValueError("--fsdp shards over ranks, and there is one (start with torchrun --nproc-per-node N)")
    if windows % world:
        raise ValueError(f"{windows} windows a step cannot be shared by {world} ranks (a divisor of {windows})")
    if s.micro_batch and fit:
        s.micro_batch = max(m for m in range(1, s.micro_batch + 1) if share % m == 0)
    if s.micro_batch and share % s.micro_batch:
        right = f"a divisor of {share}"
        raise ValueError(f"--micro-batch {s.micro_batch} does not divide the {share} windows of a rank ({right})")


def told_apart(state, s, config, world):
    """[a note] if a run, or the trunk of a branch, goes on with other ranks or another micro-batch; else []."""
    same_micro, same_ranks = state["settings"].get("micro_batch") == s.micro_batch, state.get("ranks", 1) == world
    if config.experts and not same_micro:
        return ["another micro-batch: the balancing loss is counted a micro-batch at a time, and changes"]
    if same_micro and same_ranks:
        return []
    return ["another number of ranks, or another micro-batch: the numbers agree to rounding errors, not to the bit"]
