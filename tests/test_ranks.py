"""What many devices need, tried on one machine: shards, recomputed blocks, and one static graph a kind of block."""

import contextlib
import os
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import IDS, make, two_ranks
from torch.distributed.tensor import Shard
from torch.overrides import TorchFunctionMode

import checkpoint
import grow
import horizon
import train
from model import Config, Transformer
from ranks import Ranks

ROOT = Path(train.__file__).parent
TINY = "--hidden-size 32 --num-hidden-layers 3 --context 32 --batch-tokens 256 --dtype float32 --seed 3".split()


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(Path(os.__file__).read_text()[:30000])
    return ["--data", "a.txt"]


# ---- shards ---------------------------------------------------------------------------------------------------------

BUILDS = """
import gc
import torch
import checkpoint, muon, settings, train
from ranks import Ranks

def held(files):  # bytes of tensors in memory, without those that lie in a file
    tensors = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu")
    local = (t.to_local() if type(t) is not torch.Tensor and hasattr(t, "to_local") else t for t in tensors)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(n for where, n in storages.items() if where not in files)

ranks = Ranks()
ranks.join(torch.device("cpu"), True)
original, now = checkpoint.build, {}

def build(config, value, *more, **how):
    def watched(name, shape):
        whole = value(name, shape)
        if now["sharded"] and ("down_proj" in name or "embed" in name):
            now["most"] = max(now["most"], held(now["files"]))
        return whole
    return original(config, watched, *more, **how)

checkpoint.build = build
def settle(flags):
    return settings.settle(*settings.read_flags(settings.get_parser(), (flags + " --fsdp").split()), ranks.world)

def step(module, s):
    '''What Muon holds in a step beside parameters, gradients and momentum, in batches.'''
    s.lr, s.dtype, orthogonal, seen = 1e-3, "float32", muon.orthogonal, []

    def watched(X):
        O = orthogonal(X)
        seen.append(held(now["files"]))
        return O

    named = dict(module.named_parameters())
    optimizer, _ = train.get_optimizers(named, s, {}, ranks)
    module(*torch.zeros(2, 1, 32, dtype=torch.int64))[1].backward()
    for p in muon.hidden(named).values():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    before, muon.orthogonal = held(now["files"]), watched
    optimizer.step()
    module.zero_grad()
    muon.orthogonal = orthogonal
    return (max(seen) - before) / max(sum(p.numel() * 4 for p in group["params"]) for group in optimizer.param_groups)

for flags in open("flags.txt").read().splitlines():
    start = settle(flags)
    now["files"] = {t.untyped_storage().data_ptr() for t in (start.state or {"weights": {}})["weights"].values()}
    now["most"] = before = held(now["files"])
    now["sharded"] = True
    module = train.build(start, ranks)
    mine = sum(p.to_local().numel() * 4 for p in module.parameters())
    block = sum(p.numel() * 4 for p in module.model.layers[0].parameters())
    most, start = now["most"], settle(flags)
    start.settings.fsdp = now["sharded"] = False
    alone = train.build(start, ranks)
    equal = all(torch.equal(p.full_tensor(), q) for p, q in zip(module.parameters(), alone.parameters()))
    batches = step(module, start.settings) if "new" in flags or "up" in flags else 0
    if ranks.first:
        print("built:", (most - before - mine) / block, equal, module.recompute_blocks, batches, flush=True)
    del module, alone
    gc.collect()
"""


def test_under_fsdp_no_rank_ever_holds_much_more_than_its_shards_and_one_block(text):
    flags = [
        "--hidden-size 128 --intermediate-size 1024 --num-hidden-layers 8 --out new",
        "--init parent --out init --tokens 4096",
        "--init parent --upcycle 3x2 --out up --tokens 4096",
        "--resume --out parent",
    ]
    shape = "--hidden-size 128 --intermediate-size 1024 --num-hidden-layers 8 --tie-word-embeddings"
    run = f"{shape} --out parent --tokens 4096 --eval-tokens 256 --batch-tokens 2048 --micro-batch 1"
    assert train.main([*run.split(), *text]) == 0
    state = checkpoint.read_trainer("parent")
    state["finished"], state["weights"] = False, {n: t.clone() for n, t in state["weights"].items()}
    state["optimizer"] = {}
    torch.save(state, "parent/trainer.new")
    os.replace("parent/trainer.new", "parent/trainer.pt")
    Path("flags.txt").write_text("\n".join(f"{line} --data a.txt" if "new" in line else line for line in flags))
    Path("builds.py").write_text(BUILDS)
    built = [line.split()[1:] for line in two_ranks("builds.py").splitlines() if line.startswith("built:")]
    assert len(built) == 4 and all(equal == "True" and recomputed == "True" for _, equal, recomputed, _ in built)
    assert all(0 < float(blocks) < 1.5 for blocks, *_ in built), built
    batches = [float(batches) for *_, batches in built]
    assert 1 < batches[0] < 5 and 1 < batches[2] < 5, built  # all matrices are 7 and more, and four copies are made


def test_experts_that_do_not_divide_among_the_ranks_are_cut_along_their_width():
    ranks = Ranks()
    ranks.world = 4
    weight = lambda *shape: torch.empty(shape, device="meta")
    assert ranks.placement(weight(8, 64, 32)) == Shard(0) == ranks.placement(weight(66, 32))
    assert ranks.placement(weight(6, 64, 32)) == Shard(1)
    assert ranks.placement(weight(6, 66, 32)) == Shard(0)  # neither divides


# ---- memory of the backward pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_recomputed_blocks_keep_their_inputs_alone_and_change_no_number(name):
    module, seen = make(name, num_hidden_layers=4).train(), []
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    for module.recompute_blocks in (False, True):
        saved = {}

        def pack(t, saved=saved):
            if t.untyped_storage().data_ptr() not in weights:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            _, loss, aux = module(IDS, IDS.roll(-1, 1))
        total = loss + 0.01 * aux["balance_loss"] if aux else loss
        seen.append((sum(saved.values()), loss.item(), torch.autograd.grad(total, list(module.parameters()))))
    (whole, loss, grads), (kept, again, regrads) = seen
    assert kept < 0.2 * whole and loss == again
    assert all(torch.equal(a, b) for a, b in zip(grads, regrads))


class Groups(TorchFunctionMode):
    """Notes with which dtype and groups the attention of torch is called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seen.add((args[0].dtype, kwargs["enable_gqa"]))
        return function(*args, **(kwargs or {}))


def test_fp32_attention_is_never_asked_for_groups():
    module = make("llama, grouped queries")
    with Groups() as groups:
        module(IDS)
        module.double()(IDS)
    assert groups.seen == {(torch.float32, False), (torch.float64, True)}


@pytest.mark.parametrize("experts", [0, 8])
def test_the_automatic_micro_batch_fills_the_memory_and_never_more(experts):
    shape = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    config = Config(**shape, num_key_value_heads=8, head_dim=64, experts=experts, top_k=2)
    with torch.device("meta"):
        sizes = Transformer(config).num_parameters()
    memory = 80e9 - 20 * sizes["N_active"]
    windows = horizon.default_micro_batch(config, 2048, 64, memory)
    used = 12 * 16 * (2048 + (2 if experts else 1) * 8192) * 2048 * windows
    assert memory / 2 < used <= memory
    windows = horizon.default_micro_batch(config, 2048, 1024, memory, recomputes=True)  # keeps the inputs of 16 blocks
    used = (4 * 16 * 2048 + 12 * (2048 + (2 if experts else 1) * 8192)) * 2048 * windows
    assert memory / 2 < used <= memory
    assert horizon.default_micro_batch(config, 2048, 64, -1.0) == 1  # one window at least
    large = Config(**shape, num_key_value_heads=8, head_dim=64, vocab_size=128000)
    fewer, more = (horizon.default_micro_batch(large, 2048, 64, 20e9, logits=each) for each in (12, 0))
    assert fewer == 2 < more == 4  # 2 x 2048 x 128,000 logits of 12 bytes: 6.3 GB


# ---- compiled blocks ------------------------------------------------------------------------------------------------


class Graphs:
    """A backend of torch.compile that compiles nothing and counts: graphs, and those with a dynamic size."""

    def __init__(self):
        self.graphs, self.dynamic = 0, 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        self.dynamic += any(isinstance(t, torch.SymInt) for t in inputs)
        return graph.forward


@pytest.fixture
def graphs(monkeypatch):
    torch._dynamo.reset()
    count = Graphs()

    def compile_blocks(module):
        for layer in module.model.layers:
            layer.compile(backend=count)

    monkeypatch.setattr(train, "compile_blocks", compile_blocks)
    yield count
    torch._dynamo.reset()


RUN = "--compile --tokens 4096 --eval-every 4 --log-every 1 --micro-batch 4 --eval-tokens 320".split()  # 10 = 4 + 4 + 2


def test_a_run_with_evaluations_and_samples_has_one_static_training_graph(text, graphs):
    assert train.main([*TINY, *text, *RUN, "--out", "run"]) == 0
    assert (graphs.graphs, graphs.dynamic) == (1, 0)


def test_a_mixture_of_many_blocks_has_the_graphs_of_one(text, graphs):
    counts = []
    for layers in ("1", "3"):  # on a CPU a block is cut around its dispatch, which is not compiled
        shape = [*TINY, "--experts", "4", "--top-k", "2", "--num-hidden-layers", layers]
        graphs.graphs = 0
        torch._dynamo.reset()
        assert train.main([*shape, *text, *RUN, "--out", layers]) == 0
        counts.append(graphs.graphs)
    assert counts[0] == counts[1] and graphs.dynamic == 0


def test_a_mask_is_compiled_once_it_is_open(text, graphs):
    assert train.main([*TINY, *text, "--tokens", "2560", "--eval-tokens", "320", "--out", "small"]) == 0
    grow.main("small grown --axis width --operator random --factor 2".split())
    flags = ["--init", "grown", "--mask-steps", "8", *RUN, "--batch-tokens", "256", "--dtype", "float32"]
    assert train.main([*flags, "--out", "run"]) == 0
    assert (graphs.graphs, graphs.dynamic) == (1, 0)


# ---- the first hour on a GPU ----------------------------------------------------------------------------------------


def test_what_is_run_first_on_a_gpu_runs_small_on_a_cpu(tmp_path, capsys):
    script = ROOT / "experiments/first_hour_gpu.py"
    assert subprocess.run(["bash", "-n", script.with_suffix(".sh")]).returncode == 0
    hour = SimpleNamespace(**runpy.run_path(str(script)))
    hour.grouped(small=True)
    said = capsys.readouterr().out
    assert said.count(" ok") == 5 and "idle experts get a gradient of 0.0e+00" in said
    hour.waits(small=True)
    assert capsys.readouterr().out.startswith("0 waits in a step")
    with contextlib.chdir(ROOT):
        hour.speed("8x0.13B", str(tmp_path / "run"), small=True)
    row = capsys.readouterr().out.strip().splitlines()[-1].split("|")
    assert row[1:3] == [" 8x0.13B ", " CPU "] and float(row[4].replace(",", "")) > 0
