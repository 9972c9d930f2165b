"""The processes of a distributed run, and the signals that end it. One process alone is a run of one rank."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from tqdm import tqdm


class Ranks:
    """The processes of this run, and what they say to each other. torchrun starts them; a single one is rank 0 of 1."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.local = int(os.environ.get("LOCAL_RANK", 0))  # on its node
        self.world = int(os.environ.get("WORLD_SIZE") or 1)  # how many there are
        if self.world > 1 and not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
            sys.exit(f"WORLD_SIZE is {self.world}, but RANK or MASTER_ADDR is not set (torchrun, or unset WORLD_SIZE)")
        self.first = self.rank == 0
        self.device = self.mesh = None  # see join; the mesh is that of --fsdp

    def join(self, device, fsdp):
        """Takes this rank's device of the node, and waits for the other ranks. Returns the device."""
        if device.type == "cuda":
            torch.cuda.set_device(self.local)
            device = torch.device("cuda", self.local)
        if self.world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))  # the first rank may have a corpus to encode
        self.mesh = init_device_mesh(device.type, (self.world,)) if fsdp else None
        self.device = device
        return device

    def say(self, text):
        if self.first:
            try:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()
            except OSError:  # nobody reads any more: Ctrl-C ends `| tee`, too. Go on, and save; log.csv has the rows
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def sum(self, t):
        """Over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def mean(self, t):
        return self.sum(t) / self.world

    def largest(self, number):
        number = torch.tensor(number)
        if self.world > 1:
            dist.all_reduce(number, op=dist.ReduceOp.MAX)  # on the CPU, over gloo: no accelerator waits for it
        return int(number)

    def agree(self, value):
        """The value of the first rank that has one (not None), such as an error or a folder's name, given to all."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return next((v for v in values if v is not None), None)

    def shard(self, module):
        """Spreads the parameters of an empty module, on the meta device, over the ranks. In use, one block at a time is
        gathered."""
        for part in (*module.model.layers, module):
            fully_shard(part, mesh=self.mesh, shard_placement_fn=self.placement)
        module.to_empty(device=self.device)
        if module.config.tie_word_embeddings:  # to_empty has untied them
            module.lm_head.weight = module.model.embed_tokens.weight

    def placement(self, p):
        """Which dimension is cut: the first; of experts whose number does not divide, the second if that one does."""
        return Shard(1) if p.dim() == 3 and p.shape[0] % self.world and p.shape[1] % self.world == 0 else Shard(0)

    def whole(self, t):
        """A tensor on the CPU of the first rank, None on the others. All take part: a shard is only a part of it."""
        t = t.full_tensor() if isinstance(t, DTensor) else t
        return t.detach().cpu() if self.first else None


class Signals:
    """Ctrl-C, SIGTERM, and SIGHUP of a closed terminal (unless it is ignored, as under nohup): noted at once, obeyed
    between two steps. `number` is that of the first one, or 0. A second one ends the process at once, but not within
    a second: torchrun hands one on that its processes may have had from elsewhere."""

    def __init__(self):
        self.number, self.time = 0, 0.0
        asked = [signal.SIGINT, signal.SIGTERM]
        asked += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
        self.before = {s: signal.signal(s, self.note) for s in asked}

    def note(self, number, frame):
        if self.number and time.monotonic() > self.time + 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.time = number, time.monotonic()

    def ignore(self):
        for s in self.before:
            signal.signal(s, signal.SIG_IGN)

    def restore(self):
        for s, handler in self.before.items():
            signal.signal(s, handler)
