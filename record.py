"""The folder of a run, while it is written: tables, samples, checkpoints.

    log.csv  eval.csv     a row a logged step, a row an evaluation (runs.py)
    samples.txt           the same prompt and seed at 0, 10, 50 and 100 % of the run
    model.safetensors, config.json, tokenizer.json ...    the checkpoint, which transformers opens (checkpoint.py)
    run.json              tokenizer, counts of parameters, and the lineage with this run's entry at its end
    trainer.pt            all that --resume needs, and the commit of a save: it is renamed into place last
    step-N/               all of that as it was at step N: a snapshot
"""

import itertools
import os
import shutil
import time
import weakref
from contextlib import suppress
from pathlib import Path

import torch

import checkpoint
import data
import runs
from files import rename, replacing, write_json

# Dense bf16 peaks in FLOP/s, from the makers' data sheets. The first key found in the device's name counts.
PEAKS = {
    "B200": 2250e12, "GH200": 989.4e12, "H200": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip


def lock(folder):
    """A descriptor that locks `folder` until it is closed. OSError if another process has locked it. Windows, and
    some file systems, know no such locks."""
    if os.name != "posix":
        return os.open(os.devnull, os.O_RDONLY)
    import fcntl

    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise OSError(f"{folder} is being written by another process (wait until it has ended)") from None
    except OSError:  # no locks here
        pass
    return held


class Record:
    """The run's folder: tables, samples, checkpoints. The first rank writes; under --fsdp all take part in a save."""

    def __init__(self, start, ranks, corpora, reader, module, optimizers, mask=None, overwrite=False):
        self.start, self.settings, self.ranks, self.corpora, self.reader = start, start.settings, ranks, corpora, reader
        self.module, self.optimizers, self.mask = module, optimizers, mask
        self.flops_per_token = module.flops_per_token(start.settings.context)
        if start.kind == "resume":
            step = last = start.state["step"]
            self.history = start.lineage[:-1]  # without this run's own entry
            self.seconds = start.state["seconds"]  # in earlier processes
            self.samples, self.reads_before = start.state["samples"], start.state["reads_before"]
        else:
            step, last = 0, -1
            self.history, self.seconds, self.samples, self.reads_before = start.lineage, 0.0, [], dict(reader.read)
        gpu = torch.cuda.get_device_name() if ranks.device.type == "cuda" else ""
        self.peak = next((peak for name, peak in PEAKS.items() if name in gpu), None)
        self.load = None  # tokens of each expert, (layers, experts), in the step that was logged last
        made = self.make_folder(overwrite) if ranks.first else None
        self.folder, self.since = ranks.agree(made), time.time()
        self.last_time, self.last_step = self.since, step  # of the last row
        self.settings.out = str(self.folder)
        self.columns = "step tokens flops seconds lr loss grad_norm tokens_per_second tflops mfu".split()
        if start.config.experts:
            self.columns += ["balance_loss", "z_loss", "max_violation", "dropped", "router_entropy"]
        self.eval_columns = ["step", "tokens", "flops", "seconds"]
        self.eval_columns += [f"{c.name}_{what}" for c in corpora for what in ("loss", "bits_per_byte")]
        if ranks.first:
            runs.open_table(self.folder / "log.csv", self.columns, last)
            runs.open_table(self.folder / "eval.csv", self.eval_columns, last)
            self.write_samples()

    def make_folder(self, overwrite):
        """The run's folder, locked as long as this object lives. Raises OSError if it is locked already, if it exists,
        or if its owner has saved between our reading of its state and the lock."""
        out, resumes = self.settings.out, self.start.kind == "resume"
        if out:
            folder = Path(out)
            if overwrite and folder.is_dir():
                os.close(lock(folder))  # refuses if a run is alive in it
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=resumes)
        else:
            for i in itertools.count(1):
                folder = Path(f"out/run-{i}")
                with suppress(FileExistsError):
                    folder.mkdir(parents=True)
                    break
        weakref.finalize(self, os.close, lock(folder))
        if resumes and checkpoint.read_trainer(folder)["step"] != self.start.state["step"]:
            raise OSError(f"{folder} went on while this process began (the same command again)")
        for path in () if resumes else self.start.besides:
            shutil.copyfile(path, folder / path.name)
        return folder

    def write_samples(self):
        (self.folder / "samples.txt").write_text("".join(self.samples), encoding="utf-8")

    def progress(self, step):
        tokens = step * self.settings.batch_tokens
        seconds = round(self.seconds + time.time() - self.since, 3)
        return {"step": step, "tokens": tokens, "flops": tokens * self.flops_per_token, "seconds": seconds}

    def log_evaluation(self, step, losses):
        row = self.progress(step)
        for c in self.corpora:
            row[f"{c.name}_loss"] = f"{losses[c.name]:.6f}"
            row[f"{c.name}_bits_per_byte"] = f"{c.bits(losses[c.name]):.6f}"
        if self.ranks.first:
            runs.add_row(self.folder / "eval.csv", self.eval_columns, row)

    def log_sample(self, step, steps, text):
        self.samples.append(f"==== step {step} of {steps} ====\n{text}\n\n")
        if self.ranks.first:
            self.write_samples()

    def log_step(self, step, lr, loss, norm, routing, micros):
        """Writes a row of log.csv. Returns (what the terminal shows, tokens a second since the row before).

        routing: a mixture's aux (moe.py), summed up over a step's `micros` micro-batches. As its sums and means are
        over the ranks, all of them call this."""
        row = {"lr": f"{lr:.6g}", "loss": f"{loss:.6f}", "grad_norm": f"{norm:.6f}"}
        if routing:
            self.load = self.ranks.sum(routing["counts"].float())
            violation = (self.load.max(-1).values / self.load.mean(-1) - 1).mean()
            means = torch.stack([routing[name] for name in ("balance_loss", "z_loss", "dropped", "entropy")]) / micros
            balance, z, dropped, entropy = self.ranks.mean(means).tolist()
            row |= {"balance_loss": f"{balance:.6f}", "z_loss": f"{z:.6f}", "max_violation": f"{violation:.6f}",
                    "dropped": f"{dropped:.6f}", "router_entropy": f"{entropy:.6f}"}  # fmt: skip
        speed = (step - self.last_step) * self.settings.batch_tokens / (time.time() - self.last_time)
        self.last_time, self.last_step = time.time(), step
        mfu = speed * self.flops_per_token / self.peak / self.ranks.world if self.peak else None
        row |= {"tokens_per_second": round(speed, 1), "tflops": round(speed * self.flops_per_token / 1e12, 4),
                "mfu": round(mfu, 4) if self.peak else ""}  # fmt: skip
        if self.ranks.first:
            runs.add_row(self.folder / "log.csv", self.columns, self.progress(step) | row)
        return f"loss {loss:.4f}  {speed:,.0f} tokens/s" + (f"  MFU {mfu:.1%}" if self.peak else ""), speed

    def save(self, folder, step, finished):
        """Everything at this step into `folder`. trainer.pt comes last, by a rename, and --resume takes its weights and
        state from there alone: a save that is cut short loses no earlier one."""
        whole, tokenizer = self.ranks.whole, self.start.tokenizer
        weights = {n: whole(t) for n, t in self.module.state_dict().items()}
        effective = weights
        if self.mask:  # multiplied in
            effective = {n: whole(t) for n, t in self.mask.effective().items()}
        states = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        moments = {n: {k: whole(t) for k, t in states.get(p, {}).items()} for n, p in self.module.named_parameters()}
        if not self.ranks.first:
            return
        now, kept = self.progress(step), vars(self.settings)
        entry = {
            "step": "train", "tokens": now["tokens"], "flops": now["flops"], "seed": self.settings.seed,
            "data": self.reader.since(self.reads_before), "settings": {**kept, "tokenizer": tokenizer.key},
        }  # fmt: skip
        sizes = self.module.num_parameters()
        run = {"tokenizer": tokenizer.name, "step": step, **sizes, "lineage": [*self.history, entry]}
        state = {
            "format": 1, "step": step, "finished": finished, "settings": kept, "config": vars(self.start.config),
            "run": run, "weights": weights, "optimizer": moments, "sequence": self.reader.sequence,
            "read": self.reader.read, "reads_before": self.reads_before, "samples": self.samples,
            "seconds": now["seconds"], "lr": self.optimizers[0].param_groups[0]["lr"], "ranks": self.ranks.world,
        }  # fmt: skip
        checkpoint.save(self.module, folder, tokenizer, effective, step)
        write_json(folder / "run.json", run)
        with replacing(folder / "trainer.pt") as beside:
            torch.save(state, beside)

    def snapshot(self, step, finished):
        """A whole folder step-N inside the run's, tables included."""
        partial, target = self.folder / f"step-{step}.partial", self.folder / f"step-{step}"
        if self.ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            tables = (self.folder / name for name in ("log.csv", "eval.csv", "samples.txt"))
            for path in (*tables, *checkpoint.besides(self.folder)):
                shutil.copyfile(path, partial / path.name)
        self.save(partial, step, finished)
        if self.ranks.first:
            shutil.rmtree(target, ignore_errors=True)
            rename(partial, target)

    def summarise(self, losses):
        """The last lines in the terminal, and the run's plot. losses: of the last evaluation, {corpus: nats}."""
        s = self.settings
        rulers = {c.name: data.ngram_losses(c, s.context, s.eval_tokens) for c in self.corpora}
        in_bits = {c.name: c.bits(losses[c.name]) for c in self.corpora}
        text = not self.start.tokenizer.key.startswith("ids:")
        runs.summarise(self.folder, rulers, losses, in_bits, self.load, self.samples[-1], text)
