"""nanoGPT's recipe for a CPU, in our own words: the baseline of race.py and bench_train.py.

    python experiments/nanogpt.py --tokens 1e6 --seed 1    # prints seconds of training, tokens and loss as JSON

It is what the README of github.com/karpathy/nanoGPT runs on a CPU: config/train_shakespeare_char.py with 4 layers of
128, 4 heads, context 64, 12 windows a step and no dropout. There it runs 2,000 steps; here `--tokens` decides, and the
cosine ends where the run ends, as its config advises. The text is regrow's default, bytes of Python.

The model: learned positions, LayerNorm without bias, one joined query-key-value product, torch's fused attention, a
GELU MLP of four times the width, a tied head. The loop: windows from random places, AdamW, which decays matrices alone
and is fused on CUDA only, and clipping. All of it is fp32: its train.py's `dtype` reaches nothing on a CPU, where it
neither opens an autocast nor scales gradients. Checked against the sources: 828,544 parameters in both; from the same
weights the same loss and gradients, to the last bit, and after 150 steps on the same batches the same loss to 1e-7.

Left out: printing, its evaluations, and opening the text anew for each batch. That makes the baseline faster.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from tables import whole
from tokenizer import load_tokenizer

WIDTH, LAYERS, HEADS, CONTEXT, WINDOWS = 128, 4, 4, 64, 12
LR, MIN_LR, WARMUP, BETAS = 1e-3, 1e-4, 100, (0.9, 0.99)


class GPT(nn.Module):
    def __init__(self, vocab, width, layers, heads, context):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, 0.02 / (2 * layers) ** 0.5 if "project" in name else 0.02)

    def forward(self, ids, targets):
        """ids and targets (B, T) -> the mean loss, nats a token."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))  # (B, T, width)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # (B, T, vocab)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.project1 = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.project2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, D / heads)
        x = x + self.project1(y.transpose(1, 2).contiguous().view(B, T, D))
        return x + self.project2(F.gelu(self.up(self.norm2(x))))


def rate(step, steps):
    """The learning rate of update number `step`, counted from 0, of `steps`."""
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    left = (steps - step) / (steps - WARMUP)
    return MIN_LR + (LR - MIN_LR) * 0.5 * (1 - math.cos(math.pi * left))


def train(module, text, steps):
    """Trains on `text`, an array of tokens -> seconds."""
    matrices, gains = ([p for p in module.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        starts = torch.randint(len(text) - CONTEXT, (WINDOWS,)).tolist()
        ids, targets = data.inputs_and_targets([text[s : s + CONTEXT + 1] for s in starts])
        module(ids, targets).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def get_corpus():
    """regrow's default text, with its own split."""
    return data.prepare("python", load_tokenizer("bytes"), quiet=True)[0]


@torch.no_grad()
def evaluate(loss_of, corpus, context):
    """Loss, nats a byte, on the bytes of regrow's validation windows of 256, cut into windows of `context`.

    loss_of(ids, targets) is the mean loss of a few windows."""
    ids, targets = (t.view(-1, context) for t in data.validation_windows(corpus, 256))
    total = sum(loss_of(x, y).double() * len(x) for x, y in zip(ids.split(64), targets.split(64)))
    return total.item() / len(ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=whole, default=2000 * WINDOWS * CONTEXT, help="to train (default: 2000 steps)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and batches (default: %(default)s)")
    args = parser.parse_args()
    corpus, steps = get_corpus(), max(1, round(args.tokens / (WINDOWS * CONTEXT)))
    torch.manual_seed(args.seed)
    module = GPT(corpus.vocab_size, WIDTH, LAYERS, HEADS, CONTEXT)
    seconds = train(module, corpus.train, steps)
    loss = evaluate(module, corpus, CONTEXT)
    print(json.dumps({"seconds": seconds, "tokens": steps * WINDOWS * CONTEXT, "loss": loss}))


if __name__ == "__main__":
    main()
