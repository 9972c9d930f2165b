"""The trainer: one device or many, the same numbers up to rounding.

    python train.py                                            # dense, on text this machine already has
    python train.py --experts 8 --top-k 2 --granularity 4      # MoE: 32 experts of a quarter's width, 8 a token
    python train.py --init out/dense --data cpp:0.9,python:0.1 # continual pretraining with 10 % replay
    python train.py --init out/dense --upcycle 8x2             # upcycle in memory on every rank, then train
    python train.py --init out/dense --stack 4                 # grow in memory, then train
    python train.py --branch out/trunk/step-500 --tokens 1e6   # decay from a snapshot: one trunk, many budgets
    python train.py --resume --out out/run-1                   # go on after Ctrl-C, a crash, a power cut
    torchrun --nproc-per-node 8 train.py ...                   # DDP; --fsdp shards parameters and optimizer

`main` reads in the order in which things happen: settings, model, data, optimizer, and then the loop, which evaluates,
saves, sets the rate, accumulates micro-batches, clips, steps and logs. settings.py settles what the flags mean together
and returns a `Start`. Its `kind` is new, init, branch or resume. Its `state` is trainer.pt: that of the resumed run, or
of the trunk that a branch leaves, or None. A branch is all decay: its schedule is wsd without warmup.

A step is `--batch-tokens` tokens over all ranks. Let it be 2,048 tokens, or 8 windows of 256, and let a rank
take `--micro-batch` 2 of them at once. One rank then accumulates 4 times, two ranks 2 times each, over equal windows:
n ranks give the numbers of one rank that accumulates n times as often.

Weights are kept and updated in fp32. Products run in bf16 (autocast) where the hardware is fast at it; evaluation is
always in fp32. A run leaves a folder, which record.py writes: a checkpoint that transformers opens, and its tables.

Left out: tensor, pipeline and expert parallelism, a search for the learning rate, a metrics service (log.csv is one).

Try:
  1. `python train.py --schedule constant --tokens 5e5 --out out/c` and `python train.py --branch out/c --tokens 1e5
     --out out/d`: the branch falls by about a tenth of a nat in its hundred thousand tokens: what the decay is worth.
  2. Run one command with `--micro-batch 2` and with `--micro-batch 8` in `--dtype float32`: log.csv agrees to rounding
     errors for a dense model. For an MoE it does not quite: its balancing loss is counted a micro-batch at a time.
  3. Train with `--grad-clip 0 --optimizer adamw --lr 0.03`: read in log.csv at which grad_norm the loss leaves.
"""

import errno
import importlib.util
import itertools
import math
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext
from shlex import quote

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import checkpoint
import cpu
import data
import horizon
import model
import moe
import muon
import operators
import settings
import upcycle
from mask import Mask
from names import packed
from ranks import Ranks, Signals
from record import Record

# ---- the parts of a run ---------------------------------------------------------------------------------------------


def build(start, ranks):
    """The module, the same one on every rank; under --fsdp each rank has its shards alone, and no rank ever had more
    than one tensor whole."""
    s, config = start.settings, start.config
    if start.state:
        value = lambda name, shape: start.state["weights"][name].clone()  # out of the file
    elif start.kind == "init":
        folder = checkpoint.find(s.init)
        read, _ = checkpoint.reader(folder, checkpoint.read_config(folder))
        for operator in start.operators:
            read = operators.through(operator, read, torch.float32)
        value = lambda name, shape: packed(config, name, shape, read)
    else:
        value = lambda name, shape: model.initial(config, name, shape, s.seed)
    module = checkpoint.build(config, value, shard=ranks.shard if s.fsdp else None)
    if start.state:
        del start.state["weights"]  # lets go of trainer.pt, which Windows would not replace while it is mapped
    module.recompute_blocks = s.fsdp if s.checkpoint_blocks is None else s.checkpoint_blocks
    return module.to(ranks.device)


def prepare(s, tokenizer, ranks):
    """The corpora. The first rank of each node prepares them, the others read its cache. Raises ValueError on all."""
    corpora = problem = None
    if ranks.local == 0:
        try:
            corpora = data.prepare(s.data, tokenizer, quiet=not ranks.first, context=s.context)
        except (ValueError, FileNotFoundError) as error:
            problem = str(error)
    if problem := ranks.agree(problem):
        raise ValueError(problem)
    return corpora or data.prepare(s.data, tokenizer, quiet=True, context=s.context)


def get_reader(start, corpora, ranks):
    """(what hands out the windows, notes for the user). The seed of their order, and the place in the text, are those
    after the lineage. A resumed run and a branch take only the seed from it: trainer.pt has their exact place."""
    s, state = start.settings, start.state
    if state:
        data.same_text(state["run"]["lineage"][-1], corpora)
    seed, sequence, read, notes = data.position(start.lineage, corpora, s.context, start.tokenizer.key)
    if state:
        sequence, read = state["sequence"], state["read"]
        notes = settings.told_apart(state, s, start.config, ranks.world)
    return data.Reader(corpora, s.context, s.seed if seed is None else seed, sequence, read), notes


def without_effect(start, given, order, module, device):
    """Notes on what was asked for and does not do what one may think. order: the seed of the order of the text."""
    s, notes = start.settings, [upcycle.stays_equal(operator.entry) for operator in start.operators]
    for name, schedules in (("decay_fraction", ("wsd",)), ("min_lr", ("wsd", "cosine"))):
        if name in given and s.schedule not in schedules:
            notes.append(f"{settings.flag(name)} {given[name]} changes nothing with --schedule {s.schedule}")
    draws = start.operators or s.mask_steps
    if start.kind == "init" and "seed" in given and s.seed != order and not draws:
        notes.append(f"--seed {s.seed} changes nothing: the text goes on in the parent's order, and nothing is drawn")
    if device.type == "cuda" and start.config.experts:
        down_proj = module.model.layers[0].mlp.experts.down_proj
        if not moe.can_group(device, getattr(torch, s.dtype), down_proj):
            notes.append("experts come one after the other (faster: bfloat16, widths that 8 divides, Ampere or later)")
    return list(filter(None, notes))


def get_optimizers(named, s, moments, ranks):
    """[Muon, if it is asked for, and AdamW] for the parameters `named` {name: parameter}; matrices decay. moments:
    those of an earlier run, or {}."""
    matrices = muon.hidden(named) if s.optimizer == "muon" else {}
    rest = [p for name, p in named.items() if name not in matrices]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if matrices:
        optimizers.insert(0, muon.Muon(matrices, s.lr, s.weight_decay, dtype=getattr(torch, s.dtype)))
    for group in optimizers[-1].param_groups:
        group["factor"] = muon.OTHERS if matrices else 1.0
    for name, state in moments.items():
        p, optimizer = named[name], optimizers[0 if name in matrices else -1]
        for k, t in state.items():
            t = t.clone().to(ranks.device)
            if ranks.mesh and t.dim():
                t = distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)
            optimizer.state[p][k] = t
    return optimizers


def rate(step, steps, s):
    """The learning rate of update number `step`, counted from 0, of `steps`."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    match s.schedule:
        case "constant":
            return s.lr
        case "cosine":
            left = (steps - step) / max(1, steps - s.warmup)  # 1 after warmup, 0 at the end
            factor = 0.5 * (1 - math.cos(math.pi * left))
        case "wsd":
            factor = min(1, (steps - step) / max(1, s.decay_fraction * steps))
    return s.min_lr + (s.lr - s.min_lr) * factor


def compile_blocks(module):
    torch._dynamo.config.optimize_ddp = False  # DDP's own way of cutting graphs would cut each block
    for layer in module.model.layers:
        layer.compile()


def eagerly(compiled):
    """For evaluation and samples: their shapes would make torch compile training's graphs anew, as dynamic ones."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def evaluate(module, parallel, windows, micro_batch, ranks, device):
    """{corpus: loss, nats a token} on fixed windows {corpus: (ids, targets)}, in fp32; each rank takes its share."""
    losses = {}
    module.eval()
    for name, (ids, targets) in windows.items():
        total = torch.zeros((), dtype=torch.float64)
        for r in range(math.ceil(len(ids) / (ranks.world * micro_batch))):  # as often on every rank, as --fsdp needs
            lo = (r * ranks.world + ranks.rank) * micro_batch
            x, y = ids[lo : lo + micro_batch], targets[lo : lo + micro_batch]
            dummy = len(x) == 0
            x, y = (ids[:1], targets[:1]) if dummy else (x, y)
            with torch.no_grad():
                loss = parallel(x.to(device), y.to(device))[1]
            total += 0 if dummy else loss.cpu().double() * y.numel()
        losses[name] = ranks.sum(total).item() / targets.numel()
    module.train()
    return losses


# ---- the run --------------------------------------------------------------------------------------------------------


@contextmanager
def refusing(parser, ranks, kinds=(ValueError, FileNotFoundError)):
    """What is wrong with the flags, or with what they name, ends the run on every rank; the first one says it."""
    try:
        yield
    except kinds as error:
        if ranks.first:
            parser.error(str(error))  # exits, too
        sys.exit(2)


def main(argv=None):
    start_time, ranks = time.time(), Ranks()
    parser = settings.get_parser("\n".join(__doc__.split("\n")[2:10]))
    args, given = settings.read_flags(parser, argv)

    # settings, and what depends on the device
    with refusing(parser, ranks):
        device = model.pick_device(args.device)
        if device.type == "mps" and ranks.world > 1:
            raise ValueError("--device mps: processes on it cannot talk to each other (one process, or --device cpu)")
        start = settings.settle(args, given, ranks.world)
    kind, s, config, tokenizer, lineage, state, *_ = start
    resumes = kind == "resume"
    if resumes and state["finished"]:
        more = f"python train.py --init {quote(s.out)} --tokens ..."
        ranks.say(f"{s.out} is finished: {state['step']} steps (more: {more})")
        return 0
    device = ranks.join(device, s.fsdp)
    if device.type == "cpu":
        cpu.keep_memory()
    if s.dtype == "auto":
        s.dtype = "bfloat16" if horizon.fast_bf16(device) else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16) if s.dtype == "bfloat16" else nullcontext()
    compiled = s.compile
    if compiled is None:
        compiled = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    ranks.say(f"{s.data} with {tokenizer.name} tokens on {ranks.world} x {device.type}, {s.dtype}")

    # model and horizon
    module = build(start, ranks)
    sizes, flops_per_token = module.num_parameters(), module.flops_per_token(s.context)
    with refusing(parser, ranks):
        steps, snapshots = horizon.complete(
            s, config, sizes, flops_per_token, device, ranks.world, lineage, module.recompute_blocks
        )
    s.micro_batch = ranks.agree(s.micro_batch)  # the first rank's: free memory may differ
    accumulate = s.batch_tokens // s.context // ranks.world // s.micro_batch
    ranks.say("  ".join(f"{name} {n:,}" for name, n in sizes.items()))
    ranks.say(f"{steps:,} steps of {s.batch_tokens:,} tokens = {ranks.world} ranks x {accumulate} x {s.micro_batch} "
              f"windows of {s.context}; {steps * s.batch_tokens * flops_per_token:.3g} FLOPs")  # fmt: skip
    ranks.say(f"{s.optimizer}, rate {s.lr} ({s.schedule}, {s.warmup} steps of warmup)")
    step, mask = state["step"] if resumes else 0, None
    if step < (s.mask_steps or 0):
        grown = [entry for entry in lineage if entry["step"] == "grow"][-1]
        mask = Mask(module, grown, s.mask_steps, draw=not resumes)
        mask.open(step)

    # data
    with refusing(parser, ranks):
        corpora = prepare(s, tokenizer, ranks)
        reader, notes = get_reader(start, corpora, ranks)
    notes += without_effect(start, given, reader.seed, module, device)
    windows = {c.name: data.validation_windows(c, s.context, s.eval_tokens) for c in corpora}
    for c in corpora:
        if (times := c.weight * steps * s.batch_tokens / len(c.train)) > 1:
            notes.append(f"{c.name} has {len(c.train):,} tokens to train on: this run reads them {times:.1f} times")
    prompt = tokenizer.decode(windows[corpora[0].name][0][0, :24].tolist())
    prompt = tokenizer.encode([prompt])[0].tolist()
    for note in notes:
        ranks.say(f"note: {note}")

    # replicas, then the optimizer
    parallel = module
    if ranks.world > 1 and not s.fsdp:
        parallel = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    optimizers = get_optimizers(dict(module.named_parameters()), s, state.pop("optimizer") if state else {}, ranks)

    def evaluation():
        with eagerly(compiled):
            losses = evaluate(module, parallel, windows, s.micro_batch, ranks, device)
        shown = (f"{c.name} {losses[c.name]:.4f} nats ({c.bits(losses[c.name]):.3f} bits/byte)" for c in corpora)
        return losses, "  ".join(shown)

    def update(lr):
        """One step of the optimizers: (this rank's loss and a mixture's aux, summed over its micro-batches; the norm of
        the whole gradient)."""
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = lr * group.get("factor", 1.0)
        items = reader.take(accumulate * s.micro_batch * ranks.world)
        loss_sum, routing = torch.zeros((), device=device), {}
        for micro in range(accumulate):
            lo = (micro * ranks.world + ranks.rank) * s.micro_batch
            x, y = reader.load(items[lo : lo + s.micro_batch], device)
            last = micro == accumulate - 1
            syncs = last or parallel is module  # DDP averages gradients once a step, FSDP after each micro-batch
            with nullcontext() if syncs else parallel.no_sync():
                with autocast:
                    _, loss, aux = parallel(x, y)
                total = loss
                if aux:
                    total = loss + s.balance_coef * aux["balance_loss"] + s.z_coef * aux["z_loss"]
                    routing = {k: routing.get(k, 0) + v.detach() for k, v in aux.items()}
                (total / accumulate).backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), s.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss_sum, routing, norm

    if steps == 0:
        ranks.say(evaluation()[1])
        return 0

    with refusing(parser, ranks, OSError):
        record = Record(start, ranks, corpora, reader, module, optimizers, mask, args.overwrite)
    signals = Signals()
    quiet = not ranks.first or not sys.stderr.isatty()
    bar = tqdm(total=steps, initial=step, unit="step", disable=quiet, dynamic_ncols=True)
    module.train()
    if compiled and not mask:
        compile_blocks(module)
    sampled = {0, steps // 10, steps // 2, steps}
    pending = not resumes  # is this step still to be evaluated and saved? The one that a run resumes at is not
    stop = code = 0  # a signal's number; the exit status
    while True:
        # evaluate, sample, save
        evaluates = step % s.eval_every == 0 or step == steps or step in snapshots
        if device.type != "cpu" and (evaluates or step in sampled):
            torch.accelerator.synchronize()  # or queued training counts as pause; before a save .item() has waited
        pause = time.time()
        if pending:
            if evaluates:
                losses, shown = evaluation()
                ranks.say(f"step {step:>6}  validation  {shown}")
                if not all(map(math.isfinite, losses.values())):
                    good = s.out if step else "none"
                    ranks.say(f"step {step}: the loss is no number: stopped. Last save: {good}")
                    code = 1
                    break
                record.log_evaluation(step, losses)
            if step in sampled and (ranks.first or s.fsdp):
                with eagerly(compiled):
                    ids = [*prompt, *model.generate(module, prompt, 160, temperature=0.8, top_p=0.95, seed=1)]
                record.log_sample(step, steps, tokenizer.decode(ids))
            try:
                if step and step in snapshots:
                    record.snapshot(step, finished=step == steps)
                if step == steps or step % s.save_every == 0 or stop:
                    record.save(record.folder, step, finished=step == steps)
            except (OSError, RuntimeError, checkpoint.SafetensorError) as error:  # a full disk has three names
                bar.close()
                print(f"train.py: step {step} could not be saved: {error} (make room, then: "
                      f"python train.py --resume --out {quote(s.out)})", file=sys.stderr)  # fmt: skip
                raise SystemExit(1) from None
            if stop and step < steps:
                code = 128 + stop
                signals.ignore()  # one that came while this rank waits would end it, and the others with it
                ranks.agree(None)  # the others wait for the first one's save: torchrun ends all when one has gone
                ranks.say(f"stopped at step {step}; go on with: python train.py --resume --out {quote(s.out)}")
        if step == steps or code:
            break
        pending = True
        record.last_time += time.time() - pause  # tokens per second are those of training

        lr = rate(step, steps, s)
        loss_sum, routing, norm = update(lr)
        step += 1
        if mask:
            mask.open(step)
            if step == s.mask_steps and compiled:  # before that each masked layer would be a graph of its own
                compile_blocks(module)
        bar.update()
        stop = ranks.largest(signals.number)  # obeyed at the top of the loop; a later Ctrl-C ends at once, unsaved

        # log; and before each sample and save look whether loss and norm are numbers
        due = step % s.log_every == 0 or step in (1, steps)
        if not (due or step % s.save_every == 0 or step in sampled | snapshots or stop):
            continue
        loss = ranks.mean(loss_sum / accumulate).item()  # of this step: over its micro-batches and ranks
        norm = norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            ranks.say(f"step {step}: the loss is {loss}, the gradient's norm {norm}: stopped. Last save: {s.out}")
            code = 1
            break
        if due:
            text, speed = record.log_step(step, lr, loss, norm, routing, accumulate)
            bar.set_postfix_str(text)
            if quiet:
                left = (steps - step) * s.batch_tokens / speed
                ranks.say(f"step {step:>6}/{steps}  {text}  lr {lr:.2e}  {left:,.0f} s to go")

    bar.close()
    signals.restore()
    if code == 0 and ranks.first:
        record.summarise(losses)
        ranks.say(f"{time.time() - start_time:.0f} s in all")
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    except Exception as error:
        code = 1
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            right = "make room; --resume goes on from the last save, if there is one"
            print(f"train.py: {error} ({right})", file=sys.stderr)
        elif not dist.is_initialized():
            raise
        else:  # out of memory, for example: this rank has to go, or the others wait for it
            traceback.print_exc()
    sys.stdout.flush()
    if dist.is_initialized():  # taking gloo down in order can wait for the interpreter's lock for ever
        os._exit(code)
    sys.exit(code)
