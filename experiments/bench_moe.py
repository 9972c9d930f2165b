"""
How much slower is a mixture of experts than the dense layer with the same arithmetic?

Forward and backward of one layer, alternating in one process: the dense SwiGLU layer of width K F, moe.MoE, and, if
installed, the expert layers of transformers. Every round draws new tokens for each layer, so that none profits from
group sizes that it, or the layer timed before it, has seen: a CPU compiles its bfloat16 products for each. A row prints
the median and the fastest round, the ratio dense / MoE of the medians (1.00: routing is free) and the memory kept for
the backward pass, parameters aside. No ratio is printed for a layer whose output or gradients are not those of
moe.reference in float32: 2e-2 for ours, 0.2 for the public layers, which in bfloat16 round the logits before they
choose, and so choose other experts where two are nearly equal.

    python experiments/bench_moe.py                         # bfloat16 weights; on a GPU, if there is one, compiled
    python experiments/bench_moe.py --autocast              # float32 weights under bfloat16 autocast, as in training
    OMP_NUM_THREADS=1 python experiments/bench_moe.py       # on a busy machine: one thread, its processor time
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cpu  # noqa: E402
import moe  # noqa: E402

SHAPES = [  # experts, top_k, granularity, router
    (8, 2, 1, "topk-softmax"),
    (8, 2, 4, "topk-softmax"),
    (8, 2, 8, "topk-softmax"),
    (8, 1, 1, "softmax-topk"),
    (64, 1, 1, "softmax-topk"),
]


class Dense(nn.Module):
    def __init__(self, D, width):
        super().__init__()
        self.gate, self.up = nn.Linear(D, width, bias=False), nn.Linear(D, width, bias=False)
        self.down = nn.Linear(width, D, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def public_layers(D, width, E, K, G, router):
    """The transformers layers with the mathematics of this router, by name; {} if it is not installed."""
    try:
        from transformers import MixtralConfig, Qwen3MoeConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError:
        return {}
    renormalised, layers = router == "topk-softmax", {}
    for implementation in ("eager", "grouped_mm"):  # batched_mm copies weights for every pair: 35 GB
        shape = dict(hidden_size=D, num_experts_per_tok=K * G)
        qwen = Qwen3MoeConfig(num_experts=E * G, moe_intermediate_size=width // G, norm_topk_prob=renormalised, **shape)
        pairs = [("Qwen3Moe", Qwen3MoeSparseMoeBlock, qwen)]
        if renormalised:
            mixtral = MixtralConfig(num_local_experts=E * G, intermediate_size=width // G, **shape)
            pairs.append(("Mixtral", MixtralSparseMoeBlock, mixtral))
        for name, block, config in pairs:
            config._experts_implementation = implementation
            layers[f"{name} {implementation}"] = block(config)
    return layers


def alone(device):
    """One CPU thread: then processor time is the time, less what other programs take."""
    return torch.device(device).type == "cpu" and torch.get_num_threads() == 1


def run(layer, x, dy, autocast):
    """Seconds of forward and backward, the output, and the gradient of x. Parameters have theirs in .grad."""
    x = x.detach().requires_grad_()
    for p in layer.parameters():
        p.grad = None
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    clock = time.process_time if alone(x.device) else time.perf_counter
    start = clock()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(dy.to(y.dtype))
    wait()
    return clock() - start, y.detach(), x.grad


def kept_bytes(layer, x, autocast):
    """Bytes that autograd keeps between forward and backward, parameters aside."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in layer.parameters()}, {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t  # holding the tensor keeps its address from being used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
            layer(x.detach().requires_grad_())
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)


def reference_results(ours, x, dy):
    """Output and gradients of moe.reference in float32 with the weights of our layer, by name."""
    wide = copy.deepcopy(ours).float()
    x = x.float().detach().requires_grad_()
    score_TK, expert_TK, _ = wide.route(x[0])
    y = moe.reference(x[0], score_TK, expert_TK, wide.experts.gate_up_proj, wide.experts.down_proj)[None]
    y.backward(dy.float())
    return dict(output=y.detach(), tokens=x.grad, **{n: p.grad for n, p in wide.named_parameters()})


def bench(args, shape, device):
    E, K, G, router = shape
    T, D, width = args.tokens, args.hidden_size, args.intermediate_size
    dtype = torch.float32 if args.autocast else torch.bfloat16
    ours = moe.MoE(D, width, E, K, G, router)
    for p in ours.parameters():
        nn.init.normal_(p, 0, p.shape[-1] ** -0.5)
    layers = {"dense": Dense(D, K * width), "ours": ours} | public_layers(D, width, E, K, G, router)
    for name, layer in layers.items():
        if name not in ("dense", "ours"):
            layer.load_state_dict(ours.state_dict())
        layer.to(device, dtype)
    draw = lambda: torch.randn(1, T, D, device=device, dtype=dtype)
    x, dy = draw(), draw()
    want, kept, error = reference_results(ours, x, dy), {}, {}
    forms = {name: torch.compile(layer) if device == "cuda" else layer for name, layer in layers.items()}
    for name, layer in layers.items():
        kept[name] = kept_bytes(layer, x, args.autocast)
        _, y, dx = run(forms[name], x, dy, args.autocast)
        got = dict(output=y, tokens=dx, **{n: p.grad for n, p in layer.named_parameters()})
        if name != "dense":
            error[name] = max(((got[n].float() - w).norm() / w.norm()).item() for n, w in want.items())
    seconds = {name: [] for name in forms}
    for _ in range(args.rounds):
        for name, form in forms.items():
            seconds[name].append(run(form, draw(), draw(), args.autocast)[0])
    median = {name: statistics.median(t) for name, t in seconds.items()}
    print(f"\nE {E} K {K} G {G} {router}: {E * G} experts of width {width // G}, {K * G} a token")
    for name in forms:
        ratio = median["dense"] / median[name]
        verdict = f"{ratio:8.2f}" if name == "dense" or error[name] < (2e-2 if name == "ours" else 0.2) else " refused"
        print(f"  {name:22}{median[name] * 1e3:9.1f}{min(seconds[name]) * 1e3:9.1f}{verdict}{kept[name] / 2**20:9.0f}"
              f"{error.get(name, 0):10.4f}", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a call (default 4096)")
    parser.add_argument("--hidden-size", type=int, default=512, help="D (default 512)")
    parser.add_argument("--intermediate-size", type=int, default=1408, help="F, width of a full expert (default 1408)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one that warms up (default 9)")
    parser.add_argument("--rows", type=int, nargs="+", default=range(len(SHAPES)), help="rows (default: all)")
    parser.add_argument("--autocast", action="store_true", help="float32 weights and tokens under bfloat16 autocast")
    args = parser.parse_args()
    if min(args.tokens, args.rounds) < 1 or not set(args.rows) <= set(range(len(SHAPES))):
        parser.error(f"--tokens {args.tokens} --rounds {args.rounds} --rows {list(args.rows)} "
                     f"(tokens and rounds of at least 1, rows from 0 to {len(SHAPES) - 1})")  # fmt: skip
    for E, K, G, router in SHAPES:
        try:
            moe.check(args.hidden_size, args.intermediate_size, E, K, G, router, None)
        except ValueError as wrong:
            parser.error(str(wrong))
    cpu.keep_memory()  # as train.py does
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() + ", compiled" if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, {'bfloat16 autocast' if args.autocast else 'bfloat16 weights'}, "
          f"T {args.tokens} D {args.hidden_size} F {args.intermediate_size}, forward + backward, "
          f"{args.rounds} rounds of {'processor' if alone(device) else 'wall'} time\n"
          f"  {'layer':22}{'median ms':>9}{'min ms':>9}{'ratio':>8}{'kept MB':>9}{'error':>10}")  # fmt: skip
    for row in args.rows:
        torch.manual_seed(0)
        bench(args, SHAPES[row], device)


if __name__ == "__main__":
    main()
