"""The trainer: one device or many, the same numbers.

    python train.py                                            # dense, on text this machine already has
    python train.py --experts 8 --top-k 2 --granularity 4      # MoE: 32 experts of width F/4, 8 a token
    python train.py --init out/dense --data cpp:0.9,python:0.1 # continual pretraining with 10 % replay
    python train.py --init out/dense --upcycle 8x2             # upcycle in memory on every rank, then train
    python train.py --init out/dense --stack 4                 # grow in memory, then train
    python train.py --branch out/trunk/step-500 --tokens 1e6   # decay from a snapshot: one trunk, many budgets
    python train.py --resume --out out/run-1                   # go on after Ctrl-C, a crash, a power cut
    torchrun --nproc-per-node 8 train.py ...                   # DDP; --fsdp shards parameters and optimizer

`main` reads in the order in which it happens: flags, ranks, model, data, optimizer, then the loop: evaluate, save,
rate, micro-batches, clip, step, log. A step is `--batch-tokens` over all ranks; what one rank cannot take at once is
accumulated, and n ranks give the numbers of one rank that accumulates n times. A run leaves a folder: a checkpoint that
transformers opens, `log.csv`, `eval.csv`, `samples.txt`, `loss.png`, `run.json` (what it was made of and from) and
`trainer.pt` (what a resume needs).

Weights are kept and updated in fp32. Products run in bf16 (autocast) where the hardware is fast at it, evaluation
always in fp32. The horizon, the batch and the schedule count this run only.

Left out on purpose: other optimizers than AdamW, gradient checkpointing, tensor, pipeline and expert parallelism,
a learning-rate search, a metrics service (log.csv is one).

Try:
  1. `python train.py --schedule constant --tokens 5e5 --out out/c` and `python train.py --branch out/c --tokens 1e5
     --out out/d`: the branch falls by about a tenth of a nat in its hundred thousand tokens: what the decay is worth.
  2. Run one command with `--micro-batch 4` and with `--micro-batch 16` in `--dtype float32`: log.csv agrees to rounding
     errors for a dense model. For an MoE it does not quite: its balancing loss is counted a micro-batch at a time.
  3. Delete the line that clips and train with `--lr 0.03`: read in log.csv at which grad_norm the loss leaves.
"""

import argparse
import csv
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import data
import grow
import model
import upcycle

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; the first name found in the device's counts.
PEAKS = {
    "B200": 2250e12, "GH200": 989.4e12, "H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "qk_norm", "tie_word_embeddings", "rope_theta", "experts", "top_k", "granularity", "router",
)  # fmt: skip
KEPT = (  # by --branch
    "data", "tokenizer", "context", "batch_tokens", "lr", "warmup", "schedule", "decay_fraction", "weight_decay",
    "grad_clip", "balance_coef", "z_coef", "seed", "capacity_factor",
)  # fmt: skip
MIXTURE = ("top_k", "granularity", "router", "capacity_factor", "balance_coef", "z_coef")
MACHINE = ("device", "compile", "fsdp")  # may differ in a resume, as may
RHYTHM = ("log_every", "eval_every", "save_every")
FREE = ("out", "resume", *MACHINE, *RHYTHM)


# ---- flags ----------------------------------------------------------------------------------------------------------


def number(text):
    """A count as people write it: 1e6, 2_000_000, 0."""
    value = float(text)
    if value != int(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a count (a whole number, as in 4096, 1e6 or 2_000_000)")
    return int(value)


def positive(text):
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range (0 or more)")
    return value


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


def get_parser():
    usage = "train.py [--out FOLDER] [--tokens N] [--data SPEC] [shape, optimisation, machine flags: see --help]"
    parser = model.Parser(
        "train.py", usage, "\n".join(__doc__.split("\n")[2:10]), allow_abbrev=False,
        formatter_class=Help,
    )  # fmt: skip
    c, switch = model.Config, argparse.BooleanOptionalAction

    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder of the run (default: the next free out/run-N)")
    add("--overwrite", action="store_true", help="delete the run that --out holds, and start anew")
    add("--resume", action="store_true", help="go on with the run in --out, with the settings stored there")
    add("--init", metavar="FOLDER", help="start from this checkpoint's weights, with a new optimizer and schedule")
    add("--branch", metavar="FOLDER", help="go on from this run or snapshot, optimizer included, and only decay")
    add("--source-tokens", type=number, help="tokens that the public checkpoint of --init has seen (default: unknown)")

    add = parser.add_argument_group("data").add_argument
    add("--data", help="corpora, [name=]source[:weight],...: see data.py (default: python, or the parent's)")
    add("--tokenizer", help="bytes, a tiktoken name, a rank file or a tokenizer.json (default: bytes, or the parent's)")
    add("--context", type=number, help="tokens in a window (default: 256, or the parent's)")
    add("--batch-tokens", type=number, default=4096, help="tokens of one step over all ranks")
    add("--micro-batch", type=number, help="windows a rank takes at once (default: from shape and kind of device)")

    add = parser.add_argument_group("horizon: one of").add_argument
    add("--tokens", type=number, help="tokens of this run; 0 only evaluates and writes nothing (default: 3e6)")
    add("--flops", type=positive, help="training FLOPs to spend")
    add("--tokens-per-param", type=positive, help="tokens a parameter of N_active")

    add = parser.add_argument_group("shape (of a new model)").add_argument
    add("--hidden-size", type=number, default=c.hidden_size, help="width of the residual stream")
    add("--intermediate-size", type=number, help="width of the MLP or of a full expert (default: 3 x hidden size)")
    add("--num-hidden-layers", type=number, default=c.num_hidden_layers, help="blocks")
    add("--num-attention-heads", type=number, help="query heads (default: hidden size / 64, at least 4)")
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
    add("--lr", type=positive, default=3e-3, help="highest learning rate")
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
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    dtypes = ("auto", "float32", "bfloat16")
    add("--dtype", choices=dtypes, default="auto", help="of the products; auto is bfloat16 where it is fast")
    add("--compile", action=switch, help="torch.compile each block (default: on CUDA only)")
    add("--fsdp", action="store_true", help="shard parameters, gradients and optimizer over the ranks")

    add = parser.add_argument_group("rhythm").add_argument
    add("--log-every", type=number, default=10, help="steps between two rows of log.csv")
    add("--eval-every", type=number, help="steps between evaluations (default: a tenth of the run)")
    add("--eval-tokens", type=number, default=data.EVAL_TOKENS, help="tokens of a corpus to evaluate at most")
    add("--save-every", type=number, help="steps between checkpoints (default: a tenth of the run)")
    add("--save-at", type=counts, default=[], metavar="TOKENS,...", help="keep snapshots in OUT/step-N (default: none)")
    return parser


def read_flags(argv):
    """argv -> (parser, args with every default, the dict of what was really given)."""
    parser = get_parser()
    args = parser.parse_args(argv)  # and once more, without defaults, to learn what was given
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args)))))
    return parser, args, {k: v for k, v in given.items() if v is not None}


def flag(name):
    return "--" + name.replace("_", "-")


def refuse(given, names, why):
    for name in names:
        if name in given:
            raise ValueError(f"{flag(name)} {given[name]} {why}")


def read_trainer(folder):
    """What trainer.pt holds: tensors, numbers, strings; nothing in it is run. Tensors stay on the disk until used."""
    path = Path(folder) / "trainer.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (a folder that train.py has saved to)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if state["format"] != 1:
            raise ValueError(f"format {state['format']}")
        return state
    except Exception as error:  # torch.load raises many kinds for a torn or foreign file
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} cannot be read: {first} (a trainer.pt written by train.py)") from None


def check_whole(folder):
    """Raises ValueError if a killed run left run.json and trainer.pt of different steps in the folder."""
    if (Path(folder) / "trainer.pt").exists():
        if read_trainer(folder)["step"] != model.read_json(Path(folder) / "run.json").get("step"):
            raise ValueError(f"{folder} was killed while saving (first: python train.py --resume --out {folder})")


def settle(args, given, world, each=lambda block: None):
    """Checks the flags against each other and the folders they name, before any work starts, and fills them in.

    Returns (Config, state of trainer.pt or None, lineage, tokenizer, module of --init or None). each: what upcycling
    hands every finished block to. Raises ValueError or FileNotFoundError."""
    if args.resume:
        state = take_settings(args, given)
        check_batch(args, world)
        config, lineage = model.Config(**state["config"]), state["run"]["lineage"]
        return config, state, lineage, data.load_tokenizer(args.out), None
    check_flags(args, given)
    if args.init or args.branch:
        config, state, lineage, tokenizer, module = inherit(args, given, each)
    else:
        (config, tokenizer), state, lineage, module = new_shape(args), None, [], None
    if not config.experts:
        refuse(given, MIXTURE, "is for a mixture of experts (add --experts)")
    config.balance_coef = args.balance_coef
    config.capacity_factor = args.capacity_factor if config.experts else None
    config.check()
    args.data, args.tokenizer = args.data or "python", tokenizer.name
    data.parse_spec(args.data)
    check_batch(args, world)
    return config, state, lineage, tokenizer, module


def take_settings(args, given):
    """--resume: the stored settings into args, unless a flag may differ and was given. Returns trainer.pt's state."""
    if not args.out:
        raise ValueError("--resume needs --out (the folder of the run)")
    state = read_trainer(args.out)
    saved = state["settings"]
    for name, value in given.items():
        if name not in FREE and saved.get(name) != value:
            why = f"differs from the run's {saved.get(name)} (a resumed run keeps its settings)"
            raise ValueError(f"{flag(name)} {value} {why}")
    for name, value in saved.items():  # machine flags are this command's; rhythm flags too, if given
        if name not in MACHINE and (name not in FREE or name not in given):
            setattr(args, name, value)
    return state


def check_flags(args, given):
    """What can be said without opening a parent; fills in the horizon."""
    if args.init and args.branch:
        raise ValueError("--init and --branch cannot go together (one parent)")
    horizons = [name for name in ("tokens", "flops", "tokens_per_param") if name in given]
    if len(horizons) > 1:
        raise ValueError(f"{flag(horizons[0])} and {flag(horizons[1])} are two horizons (one of them)")
    if not horizons:
        args.tokens = 3_000_000
    if args.out and Path(args.out).exists() and not args.overwrite:
        raise ValueError(f"--out {args.out} exists (another name, --resume to go on with it, --overwrite to delete it)")
    if args.overwrite and args.out and Path(args.out).exists():
        if not Path(args.out).is_dir() or (any(Path(args.out).iterdir()) and not (Path(args.out) / "log.csv").exists()):
            raise ValueError(f"--overwrite: {args.out} is not a folder of train.py (delete it yourself)")
        for parent in filter(None, (args.init, args.branch)):
            if Path(args.out).resolve() in (Path(parent).resolve(), *Path(parent).resolve().parents):
                raise ValueError(f"--overwrite would delete the parent {parent} (another --out)")
    if args.source_tokens is not None and not args.init:
        raise ValueError("--source-tokens describes the checkpoint of --init (add --init)")
    if not args.lr or args.min_lr > args.lr:
        raise ValueError(f"--lr is {args.lr} and --min-lr {args.min_lr} (a rate above 0, and not below its minimum)")
    if not 0 < args.decay_fraction <= 1:
        raise ValueError(f"--decay-fraction is {args.decay_fraction} (above 0 and at most 1)")
    for name in ("batch_tokens", "micro_batch", "context", "log_every", "eval_every", "eval_tokens", "save_every"):
        if getattr(args, name) == 0:
            raise ValueError(f"{flag(name)} is 0 (at least 1)")

    if (args.upcycle or args.stack or args.mask_steps) and not args.init:
        raise ValueError("--upcycle, --stack and --mask-steps change the checkpoint of --init (add --init)")


def inherit(args, given, each):
    """--init and --branch: shape, data and context of the parent's folder, which is upcycled or stacked if asked."""
    parent, state, module = args.init or args.branch, None, None
    of_upcycling = ("granularity", "router") if args.upcycle else ()
    refuse(given, set(SHAPE) - {*of_upcycling}, "cannot be given with a parent (the shape comes from its folder)")
    config = model.read_config(parent)
    check_whole(parent)
    if args.init:
        module = model.load(args.init)
    name, lineage = model.read_lineage(parent, args.source_tokens)
    before = data.last_settings(lineage)
    if args.branch:
        state = read_trainer(parent)
        refuse(given, KEPT, "cannot be given with --branch (it keeps data, optimizer, seed and rate)")
        for key in (*SHAPE, *KEPT, *{"dtype", "micro_batch"} - given.keys()):
            setattr(args, key, state["settings"][key])
        args.schedule, args.warmup, args.decay_fraction, args.lr = "wsd", 0, 1.0, state["lr"]
        if state["step"] < (state["settings"].get("mask_steps") or 0):
            raise ValueError(f"--branch {parent}: its mask is not open yet (a later snapshot)")
    args.data = args.data or before.get("data")
    args.context = args.context or before.get("context") or min(config.max_position_embeddings, 1024)
    if args.upcycle:
        experts, top_k = upcycle.parse(args.upcycle)
        recipe = dict(granularity=args.granularity, router=args.router, seed=args.seed)
        module = upcycle.upcycle(module, experts, top_k, each, **recipe)
        lineage = [*lineage, upcycle.lineage_step(experts, top_k, **recipe)]
    if args.stack:
        lineage = [*lineage, grow.lineage_step(module.config, factor=args.stack, seed=args.seed)]
        module = grow.grow(module, factor=args.stack, seed=args.seed)
    closed = lineage[-1]["step"] == "grow" and lineage[-1]["operator"] == "random"
    if args.mask_steps and not closed:
        raise ValueError(f"--mask-steps: {parent} has no mask (grow.py --operator random makes one)")
    if closed and not args.mask_steps and args.tokens != 0:
        raise ValueError(f"{parent} has a closed mask, behind which nothing learns (--mask-steps N opens it)")
    if module:
        config = module.config
        for layer in module.model.layers if config.experts else ():
            layer.mlp.capacity_factor = args.capacity_factor
    config.max_position_embeddings = max(config.max_position_embeddings, args.context)
    tokenizer = data.load_tokenizer(given.get("tokenizer", parent))
    tokenizer.name = given.get("tokenizer") or name or tokenizer.name
    if tokenizer.vocab_size > config.vocab_size:
        right = f"{parent} knows {config.vocab_size}: its own tokenizer"
        raise ValueError(f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens ({right})")
    if "balance_coef" not in given and args.init:
        args.balance_coef = config.balance_coef
    return config, state, lineage, tokenizer, module


def new_shape(args):
    """(Config, tokenizer) of a new model."""
    tokenizer = data.load_tokenizer(args.tokenizer or "bytes")
    D = args.hidden_size
    args.intermediate_size = args.intermediate_size or 3 * D
    args.num_attention_heads = args.num_attention_heads or max(4, D // 64)
    args.num_key_value_heads = args.num_key_value_heads or args.num_attention_heads
    if not args.head_dim:
        if D % args.num_attention_heads:
            heads = args.num_attention_heads
            raise ValueError(f"{heads} heads do not divide the hidden size {D} (a divisor, or --head-dim)")
        args.head_dim = D // args.num_attention_heads
    args.context = args.context or 256
    config = model.Config(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=args.context, eos_token_id=tokenizer.eot,
        **{k: getattr(args, k) for k in SHAPE},
    )  # fmt: skip
    return config, tokenizer


def check_batch(args, world):
    """Raises ValueError if a step does not divide into windows, ranks and micro-batches."""
    if args.batch_tokens % args.context:
        raise ValueError(f"--batch-tokens {args.batch_tokens} is not a multiple of the context {args.context}")
    windows = args.batch_tokens // args.context
    if windows % world:
        raise ValueError(f"{windows} windows a step cannot be shared by {world} ranks (a multiple of {world})")
    if args.micro_batch and windows // world % args.micro_batch:
        raise ValueError(f"--micro-batch {args.micro_batch} does not divide the {windows // world} windows of a rank")


def fast_bf16(device):
    """Whether the hardware multiplies bf16 matrices faster than fp32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return False


def default_micro_batch(config, context, windows, device):
    """The largest divisor of a rank's windows whose activations, at 34 bytes each, stay below 16 GB on an accelerator,
    0.5 GB on a CPU (where what is near the caches is fastest anyway)."""
    width = config.hidden_size + (config.top_k if config.experts else 1) * config.intermediate_size
    most = (16e9 if device.type != "cpu" else 0.5e9) / (34 * config.num_hidden_layers * width * context)
    return max(m for m in range(1, windows + 1) if windows % m == 0 and m <= max(1, most))


def rate(step, steps, args):
    """The learning rate of update number `step`, counted from 0, of `steps`."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    left = (steps - step) / max(1, steps - args.warmup)  # 1 after warmup, 0 at the end
    if args.schedule == "cosine":
        factor = 0.5 * (1 - math.cos(math.pi * left))
    elif args.schedule == "wsd":
        factor = min(1, (steps - step) / max(1, args.decay_fraction * steps))
    else:
        return args.lr
    return args.min_lr + (args.lr - args.min_lr) * factor


# ---- the run --------------------------------------------------------------------------------------------------------


def main(argv=None):
    start_time = time.time()
    parser, args, given = read_flags(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    master = rank == 0

    def fail(error):
        parser.error(str(error)) if master else sys.exit(2)

    def say(text):
        if master:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def shard(part):
        if args.fsdp and not isinstance(part, FSDPModule):
            fully_shard(part, mesh=mesh)

    # flags, devices, ranks: these before the rest, as upcycling already shards
    try:
        device = model.pick_device(args.device)
        if args.fsdp and world == 1:
            raise ValueError("--fsdp shards over ranks, and there is one (start with torchrun --nproc-per-node N)")
        if args.fsdp and args.mask_steps:
            raise ValueError("--mask-steps and --fsdp cannot go together (the mask needs whole weights: DDP)")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            device = torch.device("cuda", torch.cuda.current_device())
        if world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=1))  # the first rank may have a corpus to encode
        mesh = init_device_mesh(device.type, (world,)) if args.fsdp else None
        each = (lambda block: None) if args.stack else shard  # a stack copies whole blocks
        config, state, lineage, tokenizer, module = settle(args, given, world, each)
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    if args.resume and state["finished"]:
        say(f"{args.out} is finished: {state['step']} steps (more: python train.py --init {args.out} --tokens ...)")
        return 0
    if args.dtype == "auto":
        args.dtype = "bfloat16" if fast_bf16(device) else "float32"
    compiled = device.type == "cuda" if args.compile is None else args.compile
    autocast = torch.autocast(device.type, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()
    say(f"{args.data} with {tokenizer.name} tokens on {world} x {device.type}, {args.dtype}")

    # model: every rank builds the same one
    if args.resume or args.branch:
        module = model.Transformer(config)
        module.load_state_dict(state["weights"])
    elif not args.init:
        module = model.init_weights(model.Transformer(config), args.seed)
    sizes = module.num_parameters()
    flops_per_token = module.flops_per_token(args.context)
    module.to(device)
    step, mask = state["step"] if args.resume else 0, None
    if step < (args.mask_steps or 0):
        mask = grow.Mask(module, lineage[-2 if args.resume else -1], args.mask_steps, draw=not args.resume)
        mask.open(step)

    # the horizon in steps
    tokens = args.tokens
    if args.flops is not None:
        tokens = args.flops / flops_per_token
    elif args.tokens_per_param is not None:
        tokens = args.tokens_per_param * sizes["N_active"]
    steps = max(1, round(tokens / args.batch_tokens)) if tokens else 0
    if steps and steps < (args.mask_steps or 0):
        fail(f"--mask-steps {args.mask_steps} is beyond the run's {steps} steps (the mask would never be open)")
    windows = args.batch_tokens // args.context // world  # of this rank in a step
    args.micro_batch = args.micro_batch or default_micro_batch(config, args.context, windows, device)
    accumulate = windows // args.micro_batch
    args.warmup = steps // 50 if args.warmup is None else args.warmup
    args.eval_every = args.eval_every or max(1, steps // 10)
    args.save_every = args.save_every or max(1, steps // 10)
    snapshots = {round(t / args.batch_tokens) for t in args.save_at}
    if snapshots and not 0 < min(snapshots) <= max(snapshots) <= steps:
        right = f"from one step, {args.batch_tokens:,}, to {steps * args.batch_tokens:,} tokens"
        fail(f"--save-at {max(args.save_at):,} is not within the run ({right})")
    say("  ".join(f"{name} {n:,}" for name, n in sizes.items()))
    say(
        f"{steps:,} steps of {args.batch_tokens:,} tokens = {world} ranks x {accumulate} x {args.micro_batch} windows "
        f"of {args.context}; {steps * args.batch_tokens * flops_per_token:.3g} FLOPs"
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((p for kind, p in PEAKS.items() if kind in name), None)

    # data: the first rank of each node prepares, the others then read its cache
    problem = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            corpora = data.prepare(args.data, tokenizer, quiet=not master, context=args.context)
        except (ValueError, FileNotFoundError) as error:
            problem = str(error)
    if world > 1:
        problems = [None] * world
        dist.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
    if problem:
        fail(problem)
    if int(os.environ.get("LOCAL_RANK", 0)):
        corpora = data.prepare(args.data, tokenizer, quiet=True)
    validation = [data.validation_windows(c, args.context, args.eval_tokens) for c in corpora]
    order_seed, sequence, read, notes = data.position(lineage, corpora, args.context, tokenizer.key)
    if state:
        sequence, read, notes = state["sequence"], state["read"], []
    order_seed = args.seed if order_seed is None else order_seed
    reader = data.Reader(corpora, args.context, order_seed, sequence, read)
    for note in notes:
        say(f"note: {note}")

    # shards or replicas, then the optimizer
    for part in (*module.model.layers, module):
        shard(part)
    if compiled:
        for layer in module.model.layers:
            layer.compile()
    parallel = module
    if world > 1 and not args.fsdp:
        ids = [device.index] if device.type == "cuda" else None
        parallel = torch.nn.parallel.DistributedDataParallel(module, device_ids=ids)
    named = {grow.plain(n): p for n, p in module.named_parameters()}
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    if state:  # the moments: of the resumed run, or of the trunk
        for name, moments in state["optimizer"].items():
            p = named[name]
            optimizer.state[p] = {k: t.clone().to(device) for k, t in moments.items()}
            for k, t in optimizer.state[p].items():
                if args.fsdp and t.dim():
                    optimizer.state[p][k] = distribute_tensor(t, p.device_mesh, p.placements)

    def whole(t):
        t = t.full_tensor() if isinstance(t, DTensor) else t  # all ranks take part, and one has use for it
        return t.detach().cpu() if master else None

    def mean_over_ranks(t):
        if world > 1:
            dist.all_reduce(t)
            t /= world
        return t

    # evaluation: every rank its share of the fixed windows, in fp32
    def evaluate():
        losses = {}
        module.eval()
        for corpus, (ids, targets) in zip(corpora, validation):
            total = torch.zeros((), dtype=torch.float64)
            rounds = math.ceil(len(ids) / (world * args.micro_batch))
            for r in range(rounds):  # the same number on every rank: sharded parameters are gathered together
                lo = (r * world + rank) * args.micro_batch
                x, y = ids[lo : lo + args.micro_batch], targets[lo : lo + args.micro_batch]
                dummy = len(x) == 0
                x, y = (ids[:1], targets[:1]) if dummy else (x, y)
                with torch.no_grad():
                    loss = parallel(x.to(device), y.to(device))[1]
                total += 0 if dummy else loss.cpu().double() * y.numel()
            if world > 1:
                dist.all_reduce(total)
            losses[corpus.name] = total.item() / targets.numel()
        module.train()
        return losses

    def show(losses):
        return "  ".join(
            f"{c.name} {losses[c.name]:.4f} nats ({bits(losses[c.name], c):.3f} bits/byte)" for c in corpora
        )

    def bits(loss, corpus):
        return loss / math.log(2) / corpus.bytes_per_token

    prompt = tokenizer.decode(validation[0][0][0, :24].tolist())

    def sample(tokens=160):
        ids = tokenizer.encode([prompt])[0].tolist()
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with stance:
            new = list(model.generate(module, ids, tokens, temperature=0.8, top_p=0.95, seed=1))
        return tokenizer.decode(ids + new)

    if steps == 0:
        losses = evaluate()
        say(show(losses))
        return 0

    # the folder
    seconds, samples = 0.0, []
    if args.resume:
        out = Path(args.out)
        seconds, samples = state["seconds"], state["samples"]
    elif master:
        free = (path for i in range(1, 10**6) if not (path := Path(f"out/run-{i}")).exists())
        out = Path(args.out) if args.out else next(free)
        if args.overwrite and out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
    if world > 1:
        box = [str(out) if master else None]
        dist.broadcast_object_list(box)
        out = Path(box[0])
    args.out = str(out)
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite")}
    reads_before = dict(reader.read) if not args.resume else state["reads_before"]
    columns = ["step", "tokens", "flops", "seconds", "lr", "loss", "grad_norm", "tokens_per_second", "tflops", "mfu"]
    if config.experts:
        columns += ["balance_loss", "z_loss", "max_violation", "dropped", "router_entropy"]
    eval_columns = ["step", "tokens", "flops", "seconds"]
    eval_columns += [f"{c.name}_{what}" for c in corpora for what in ("loss", "bits_per_byte")]
    if master:
        open_table(out / "log.csv", columns, step if args.resume else -1)
        open_table(out / "eval.csv", eval_columns, step if args.resume else -1)
        (out / "samples.txt").write_text("".join(samples), encoding="utf-8")

    def counted():
        return {"step": step, "tokens": step * args.batch_tokens, "flops": step * args.batch_tokens * flops_per_token,
                "seconds": round(seconds + time.time() - since, 3)}  # fmt: skip

    def save(folder, finished=False):
        """Everything at this step into `folder`; trainer.pt last: its renaming is the commit."""
        weights = {grow.plain(n): whole(t) for n, t in module.state_dict().items()}
        shown = {n: whole(t) for n, t in mask.effective().items()} if mask else weights  # what the model computes with
        moments = {n: {k: whole(t) for k, t in optimizer.state[p].items()} for n, p in named.items()}
        if not master:
            return
        now, spent = counted(), reader.since(reads_before)
        step_now = {
            "step": "train", "tokens": now["tokens"], "flops": now["flops"], "seed": args.seed, "data": spent,
            "settings": {**settings, "tokenizer": tokenizer.key},
        }  # fmt: skip
        run = {"tokenizer": tokenizer.name, "step": step, **sizes, "lineage": [*history, step_now]}
        kept = {
            "format": 1, "step": step, "finished": finished, "settings": settings, "config": vars(config), "run": run,
            "weights": weights, "optimizer": moments, "sequence": reader.sequence, "read": reader.read,
            "reads_before": reads_before, "samples": samples, "seconds": now["seconds"],
            "lr": optimizer.param_groups[0]["lr"],
        }  # fmt: skip
        try:
            model.save(module, folder, tokenizer, shown, step)
            model.write_json(folder / "run.json", run)
            with model.replacing(folder / "trainer.pt") as beside:
                torch.save(kept, beside)
        except (OSError, RuntimeError, model.SafetensorError) as error:  # a full disk has three names
            bar.close()
            print(f"train.py: step {step} could not be saved: {error} (make room, then: "
                  f"python train.py --resume --out {out})", file=sys.stderr)  # fmt: skip
            raise SystemExit(1) from None

    # Ctrl-C and SIGTERM: noted here, obeyed between two steps
    caught = []

    def note_signal(number, frame):
        if caught:  # a second one does not wait
            raise KeyboardInterrupt
        caught.append(number)

    handlers = {s: signal.signal(s, note_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def caught_anywhere():
        number = torch.tensor(caught[0] if caught else 0)
        if world > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)  # over gloo: no accelerator waits for it
        return int(number)

    history = lineage[:-1] if args.resume else lineage  # the last entry of a resumed run is the run itself
    load = None  # of each expert, (layers, experts)
    since = last_time = time.time()
    last_step = step
    fresh = not args.resume
    sample_at = {0, steps // 10, steps // 2, steps}
    quiet = not master or not sys.stderr.isatty()
    bar = tqdm(total=steps, initial=step, unit="step", disable=quiet, dynamic_ncols=True)
    module.train()
    final, number, code = None, 0, 0

    while True:
        # evaluate, sample, save; a resumed step has done so already
        pause = time.time()
        if fresh:
            if step % args.eval_every == 0 or step == steps or step in snapshots:
                final = evaluate()
                if master:
                    row = counted()
                    for c in corpora:
                        row[f"{c.name}_loss"] = f"{final[c.name]:.6f}"
                        row[f"{c.name}_bits_per_byte"] = f"{bits(final[c.name], c):.6f}"
                    add_row(out / "eval.csv", eval_columns, row)
                say(f"step {step:>6}  validation  {show(final)}")
            if step in sample_at and (master or args.fsdp):
                samples.append(f"==== step {step} of {steps} ====\n{sample()}\n\n")
                if master:
                    (out / "samples.txt").write_text("".join(samples), encoding="utf-8")
            if step in snapshots and step and (args.fsdp or master):
                partial = out / f"step-{step}.partial"
                if master:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                    for name in ("log.csv", "eval.csv", "samples.txt"):
                        shutil.copy(out / name, partial / name)
                save(partial)
                if master:
                    shutil.rmtree(out / f"step-{step}", ignore_errors=True)
                    os.replace(partial, out / f"step-{step}")
            if step == steps or step % args.save_every == 0 or number:
                save(out, finished=step == steps)
            if number and step < steps:
                code = 128 + number
                break
        if step == steps:
            break
        fresh = True
        last_time += time.time() - pause  # tokens per second are those of training

        # one update
        lr = rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        items = reader.take(windows * world)
        loss_sum = torch.zeros((), device=device)
        parts = ("balance_loss", "z_loss", "dropped", "entropy")
        extra = torch.zeros(len(parts), device=device)
        load = None
        for micro in range(accumulate):
            first = (micro * world + rank) * args.micro_batch
            x, y = reader.load(items[first : first + args.micro_batch])
            if device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            last = micro == accumulate - 1
            if args.fsdp:
                module.set_requires_gradient_sync(last)
            with parallel.no_sync() if world > 1 and not args.fsdp and not last else nullcontext():
                with autocast:
                    _, loss, aux = parallel(x, y)
                total = loss
                if aux:
                    total = loss + args.balance_coef * aux["balance_loss"] + args.z_coef * aux["z_loss"]
                    extra += torch.stack([aux[k].detach().float() for k in parts])
                    load = aux["counts"] if load is None else load + aux["counts"]
                (total / accumulate).backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), args.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if mask:
            mask.open(step)
        bar.update()
        number = caught_anywhere()

        # log, and look before each save whether there is something worth saving
        due = step % args.log_every == 0 or step in (1, steps)
        if due or step % args.save_every == 0 or step in snapshots or number:
            loss = mean_over_ranks(loss_sum / accumulate).item()
            norm = norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item()
            if config.experts:
                extra = mean_over_ranks(extra / accumulate).tolist()
                load = load.float()
                if world > 1:
                    dist.all_reduce(load)
                violation = (load.max(-1).values / load.mean(-1) - 1).mean().item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                bar.close()
                say(f"step {step}: the loss is {loss}, the gradient's norm {norm}: stopped. Last good one: {out}")
                code = 1
                break
        if due:
            now = time.time()
            speed = (step - last_step) * args.batch_tokens / (now - last_time)
            last_time, last_step = now, step
            row = counted() | {"lr": f"{lr:.6g}", "loss": f"{loss:.6f}", "grad_norm": f"{norm:.6f}"}
            row["tokens_per_second"] = round(speed, 1)
            row["tflops"] = round(speed * flops_per_token / 1e12, 4)
            row["mfu"] = "" if peak is None else round(speed * flops_per_token / peak / world, 4)
            if config.experts:
                row |= dict(zip(columns[-5:], [f"{v:.6f}" for v in (*extra[:2], violation, *extra[2:])]))
            if master:
                add_row(out / "log.csv", columns, row)
                left = (steps - step) * args.batch_tokens / speed
                text = f"loss {loss:.4f}  {speed:,.0f} tokens/s"
                if peak:
                    text += f"  MFU {row['mfu']:.1%}"
                bar.set_postfix_str(text)
                if bar.disable:
                    say(f"step {step:>6}/{steps}  {text}  lr {lr:.2e}  {left:,.0f} s to go")

    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if code in (130, 143):
        say(f"stopped at step {step}; go on with: python train.py --resume --out {out}")
    if code == 0 and master:
        summarise(out, corpora, args, final, bits, load, samples)
        say(f"{time.time() - start_time:.0f} s in all")
    return code


# ---- tables, and the end --------------------------------------------------------------------------------------------


def open_table(path, columns, step):
    """Makes a CSV with these columns, or cuts one back to the rows up to `step`: a resumed run writes them again."""
    rows = []
    if path.exists():
        with open(path, newline="") as f:
            rows = [row for row in csv.reader(f) if row and row[0].isdigit() and int(row[0]) <= step]
    with model.replacing(path) as beside, open(beside, "w", newline="") as f:
        csv.writer(f).writerows([columns, *rows])


def add_row(path, columns, row):
    with open(path, "a", newline="") as f:
        csv.writer(f).writerow([row[c] for c in columns])


def summarise(out, corpora, args, losses, bits, load, samples):
    """The end of a run on one screen: the loss against the n-gram ruler, the plot, the sample, what to do next."""
    print("\nvalidation loss            nats/token  bits/byte     1-gram  2-gram  3-gram counts of its training text")
    rulers = {}
    for c in corpora:
        rulers[c.name] = ruler = data.ngram_losses(c, args.context, args.eval_tokens)
        better = [n for n in (1, 2, 3) if losses[c.name] < ruler[n - 1]]
        verdict = f"below {better[-1]}-gram counts" if better else "above all of them: hardly trained"
        reached = f"{losses[c.name]:>10.4f} {bits(losses[c.name], c):>10.4f}"
        print(f"  {c.name:<24} {reached}     {'  '.join(f'{r:.4f}' for r in ruler)}  {verdict}")
    if load is not None:
        print("\nload of each expert in the last step, a row a layer ('.' none, 5 an even share, 9 about twice it)")
        for i, row in enumerate((load / load.mean(-1, keepdim=True)).tolist()):
            print(f"  layer {i:>2}  " + "".join("." if v == 0 else str(min(9, max(1, round(5 * v)))) for v in row))
    plot(out, rulers)
    print(f"\n{samples[-1]}")
    print(f"written: {out}/  (model.safetensors, run.json, log.csv, eval.csv, samples.txt, loss.png)\nnext:")
    print(f'  python model.py {out} --prompt "def "')
    if load is None:
        print(f"  python train.py --init {out} --upcycle 8x2   # a mixture of experts from it")
    print(f"  python train.py --init {out} --stack 2       # a deeper model from it")
    if "cpp" not in rulers:
        print(f"  python train.py --init {out} --data cpp:0.9,python:0.1   # another language, with 10 % replay")


def plot(out, rulers):
    """loss.png: validation loss over tokens, the n-gram losses as lines across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(out / "eval.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    tokens = [float(r["tokens"]) for r in rows]
    for i, (name, ruler) in enumerate(rulers.items()):
        axes.plot(tokens, [float(r[f"{name}_loss"]) for r in rows], "o-", color=f"C{i}", markersize=3, label=name)
        for n, level in enumerate(ruler, 1):
            axes.axhline(level, color=f"C{i}", linewidth=0.8, linestyle=":")
            x, side = (tokens[-1], "right") if i % 2 == 0 else (0, "left")
            axes.text(x, level, f"{name} {n}-gram", fontsize=7, color=f"C{i}", ha=side, va="bottom")
    axes.set(xlabel="tokens of this run", ylabel="validation loss, nats a token", title=str(out))
    axes.legend(frameon=False)
    figure.savefig(out / "loss.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    if dist.is_initialized():  # taking gloo down in order can wait for the interpreter's lock for ever
        os._exit(code)
    sys.exit(code)
