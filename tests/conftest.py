"""Tests train tiny models: one thread is fastest for them, and the same sums come out in every process."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network

import pytest
import torch

import model
from model import Config, Transformer


@pytest.fixture(scope="session")
def transformers():
    """The library, or a skipped test; in continuous integration (REGROW_NO_SKIP=1) its absence is a failure."""
    if not os.environ.get("REGROW_NO_SKIP"):
        pytest.importorskip("transformers")
    return importlib.import_module("transformers")


def two_ranks(script, *flags):
    """Runs a script in two processes that talk to each other, as torchrun starts them, but without the seconds that its
    launcher takes. Returns what the first rank printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", PYTHONWARNINGS="ignore",
                            PYTHONPATH=str(Path(model.__file__).parent))  # fmt: skip
    command = [sys.executable, *map(str, (script, *flags))]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = [subprocess.Popen(command, env=env | dict(RANK=r, LOCAL_RANK=r), **pipes) for r in "01"]
    said = [rank.communicate(timeout=500) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    return said[0][0]


# Small models of every kind that a public format can say.
SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, head_dim=12, max_position_embeddings=64, qk_norm=False)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SHAPES = {
    "llama": {},
    "llama, grouped queries": dict(num_key_value_heads=2),
    "llama, one key-value head": dict(num_key_value_heads=1),
    "llama, wide odd head": dict(head_dim=22),
    "llama, tied": dict(tie_word_embeddings=True),
    "llama, scaled rope": dict(rope_scaling=LLAMA3, rope_theta=500000.0),
    "qwen3": dict(qk_norm=True),
    "qwen3, grouped, tied, wide": dict(qk_norm=True, num_key_value_heads=2, tie_word_embeddings=True, head_dim=20),
    "qwen2": dict(qkv_bias=True),
    "qwen2, grouped, tied, wide": dict(qkv_bias=True, num_key_value_heads=2, tie_word_embeddings=True, head_dim=20),
    "mixtral": dict(experts=4, top_k=2),
    "mixtral, granularity 2": dict(experts=3, top_k=2, granularity=2, num_key_value_heads=2),
    "qwen3_moe": dict(experts=4, top_k=1, granularity=2, qk_norm=True),
    "qwen3_moe, softmax over all": dict(experts=4, top_k=2, qk_norm=True, router="softmax-topk"),
}


def make(name, seed=1, **more):
    """A model whose every weight matters: gains and embeddings far from their initial values."""
    module = model.init_weights(Transformer(Config(**{**SMALL, **SHAPES[name], **more})), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in module.named_parameters():
            if n.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=generator))
            elif n.endswith("norm.weight"):
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
            elif "embed" in n or "lm_head" in n or "mlp.gate." in n:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return module.eval()


IDS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(3))

PUBLIC_KINDS = ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"]


def of_public_kind(transformers, kind, **sizes):
    """A small random model of a public kind, made by `transformers`."""
    more = dict(sliding_window=None) if kind in ("mistral", "mixtral") else {}
    if kind == "mixtral":
        more |= dict(num_local_experts=4, num_experts_per_tok=2)
    if kind == "qwen3_moe":
        more |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=97, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, **sizes, **more,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
