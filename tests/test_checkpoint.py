"""A folder: against `transformers`, against itself, and against the ways in which it can be broken."""

import json

import pytest
import torch
from conftest import IDS, PUBLIC_KINDS, SHAPES, make, of_public_kind
from safetensors.torch import load_file, save_file

import checkpoint
import configuration
import model
from model import Config


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_those_of_transformers_on_the_same_folder(name, tmp_path, transformers):
    ours = make(name)
    checkpoint.save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.model_type == name.split(",")[0]
    with torch.no_grad():
        assert (ours(IDS)[0] - theirs(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", PUBLIC_KINDS)
def test_folders_that_transformers_writes_are_read(kind, tmp_path, transformers):
    theirs = of_public_kind(transformers, kind, hidden_size=48, intermediate_size=80, num_hidden_layers=2, head_dim=16)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("one", "shards"):
        ours = checkpoint.load(tmp_path / folder)
        with torch.no_grad():
            assert (ours(IDS)[0] - theirs(IDS).logits).abs().max() < 1e-4

def test_greedy_text_equals_that_of_transformers(tmp_path, transformers):
    ours = make("qwen3, grouped, tied, wide")
    checkpoint.save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    text = theirs.generate(IDS[:1, :9], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(model.generate(ours, IDS[0, :9].tolist(), 20, temperature=0)) == text[0, 9:].tolist()

@pytest.mark.parametrize("name", SHAPES)
def test_save_then_load_is_bit_exact(name, tmp_path):
    ours = make(name)
    checkpoint.save(ours, tmp_path)
    again = checkpoint.load(tmp_path)
    assert vars(again.config) == vars(ours.config)
    for (n, a), (m, b) in zip(ours.state_dict().items(), again.state_dict().items()):
        assert n == m and torch.equal(a, b)


def test_dtype_of_loading_is_the_one_asked_for(tmp_path):
    checkpoint.save(make("llama, tied"), tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        module = checkpoint.load(tmp_path, dtype)
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert module.lm_head.weight is module.model.embed_tokens.weight
        assert module(IDS)[0].dtype == dtype

def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def shards(folder, name):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))


def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "architecture": (lambda f: edit(f, model_type="gpt2"), "'gpt2' is not supported"),
    "no hidden size": (lambda f: edit(f, hidden_size="gone"), "hidden_size is missing"),
    "a size in quotes": (lambda f: edit(f, hidden_size="16"), r"hidden_size is '16' \(a whole number"),
    "half a layer": (lambda f: edit(f, num_hidden_layers=1.5), r"num_hidden_layers is 1.5 \(a whole number"),
    "eps in quotes": (lambda f: edit(f, rms_norm_eps="1e-6"), r"rms_norm_eps is '1e-6' \(a number"),
    "rope in a list": (lambda f: edit(f, rope_scaling=[1]), r"rope_scaling is \[1\] \(an object"),
    "sliding window": (lambda f: edit(f, sliding_window=4096), "sliding_window 4096"),
    "attention bias": (lambda f: edit(f, attention_bias=True), "attention_bias True"),
    "activation": (lambda f: edit(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "rope kind": (lambda f: edit(f, rope_parameters={"rope_type": "yarn", "factor": 2}), "rope_type 'yarn'"),
    "rope twice": (lambda f: edit(f, rope_scaling={"type": "yarn"}), "'yarn' in one place and 'default' in rope_par"),
    "theta twice": (lambda f: edit(f, rope_theta=1e6), "rope_theta is 1000000.0 in one place and 10000.0 in rope_par"),
    "rope by layer": (lambda f: edit(f, rope_parameters={"full_attention": {}}), "full_attention in rope_parameters"),
    "rope, no type": (lambda f: edit(f, rope_scaling={"factor": 8}, rope_parameters="gone"), "rope_type 'missing'"),
    "theta in quotes": (lambda f: edit(f, rope_theta="1e4"), r"rope_theta is '1e4' \(a number above 0"),
    "part of a head": (lambda f: edit(f, rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor in"),
    "a word, not true": (lambda f: edit(f, tie_word_embeddings="false"), "tie_word_embeddings 'false'"),
    "quantised": (lambda f: edit(f, quantization_config={"bits": 4}), "quantization_config"),
    "heads do not group": (lambda f: edit(f, num_key_value_heads=3), "cannot share 3"),
    "wrong shape": (lambda f: edit(f, vocab_size=98), "config.json says"),
    "missing layer": (lambda f: edit(f, num_hidden_layers=3), "lacks the tensor model.layers.2"),
    "extra layer": (lambda f: edit(f, num_hidden_layers=1), "has, beyond its configuration, the tensor model.layers.1"),
    "missing tensor": (lambda f: tensors(f, lambda s: s.pop("model.norm.weight")), "lacks the tensor model.norm"),
    "truncated": (lambda f: cut(f / "model.safetensors", 5000), "not a whole safetensors file"),
    "truncated header": (lambda f: cut(f / "model.safetensors", 4), "not a whole safetensors file"),
    "git's pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), r"git's pointer to it \(git lfs pull\)"),
    "an adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "LoRA adapter: merge it into"),
    "shard outside": (lambda f: shards(f, "../a.safetensors"), "outside the folder"),
    "shard missing": (lambda f: shards(f, "b.safetensors"), "b.safetensors is missing"),
    "partial index": (lambda f: shards(f, "a.safetensors"), None),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_by_name(case, tmp_path):
    breaking, words = BROKEN[case]
    checkpoint.save(make("llama"), tmp_path)
    breaking(tmp_path)
    if words is None:
        checkpoint.load(tmp_path)
        return
    with pytest.raises((ValueError, FileNotFoundError), match=words.replace(".", r"\.")):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("granularity, words", [(0, "does not divide"), ("2", "whole number"), (3, "does not divide")])
def test_a_granularity_that_cannot_be_is_refused_by_the_name_of_its_file(granularity, words, tmp_path):
    checkpoint.save(make("mixtral, granularity 2"), tmp_path)
    edit(tmp_path, granularity=granularity)
    with pytest.raises(ValueError, match=f"config.json: granularity.*{words}"):
        checkpoint.read_config(tmp_path)


def test_a_sliding_window_that_is_switched_off_is_none(tmp_path):
    checkpoint.save(make("qwen3"), tmp_path)
    edit(tmp_path, sliding_window=4096, use_sliding_window=False, max_window_layers=2)
    checkpoint.load(tmp_path)
    edit(tmp_path, model_type="mistral")  # its class has no such switch
    with pytest.raises(ValueError, match=r"sliding_window 4096 is not supported \(null\)"):
        checkpoint.load(tmp_path)


def test_the_tokens_with_a_meaning_are_kept(tmp_path):
    checkpoint.save(make("llama"), tmp_path / "a")
    edit(tmp_path / "a", bos_token_id=4, eos_token_id=[5, 6], pad_token_id=7)
    checkpoint.save(checkpoint.load(tmp_path / "a"), tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [4, [5, 6], 7]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_number_of_experts_has_two_names(kind, tmp_path):
    names = ["num_local_experts", "num_experts"]
    theirs, other = names if kind == "mixtral" else names[::-1]
    checkpoint.save(make(kind, granularity=1, top_k=2), tmp_path)
    edit(tmp_path, **{theirs: "gone", other: 6})
    assert checkpoint.read_config(tmp_path).experts == 6


@pytest.mark.parametrize("name", ["llama", "llama, scaled rope"])
def test_older_and_newer_spelling_of_rope_and_dtype_mean_the_same(name, tmp_path):
    ours = make(name)
    checkpoint.save(ours, tmp_path)
    edit(tmp_path, rope_parameters="gone", dtype="gone")
    assert checkpoint.read_config(tmp_path) == ours.config
    checkpoint.save(ours, tmp_path)
    edit(tmp_path, rope_theta="gone", rope_scaling="gone", torch_dtype="gone")
    assert checkpoint.read_config(tmp_path) == ours.config


def test_softmax_over_all_without_qk_norm_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="topk-softmax, or a model with it"):
        Config(experts=4, router="softmax-topk", qk_norm=False).check()


def test_public_balancing_coefficient_is_converted(tmp_path):
    checkpoint.save(make("mixtral, granularity 2", balance_coef=0.06), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["router_aux_loss_coef"] == pytest.approx(0.06 / 4)
    assert checkpoint.read_config(tmp_path).balance_coef == pytest.approx(0.06)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(OSError), checkpoint.replacing(path) as beside:
        beside.write_text("half")
        raise OSError("No space left on device")
    assert checkpoint.read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


# ---- public folders, rebuilt small ----------------------------------------------------------------------------------

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
PUBLIC = {  # model_type, and what its published config.json says; sizes are small
    "Llama 2": ("llama", dict(num_key_value_heads=4, pretraining_tp=1, rms_norm_eps=1e-5, use_cache=True)),
    "Llama 3.1": ("llama", dict(rope_theta=500000.0, rope_scaling=LLAMA31, eos_token_id=[3, 5], rms_norm_eps=1e-5)),
    "Llama 3.2": ("llama", dict(rope_theta=500000.0, rope_scaling={**LLAMA31, "factor": 32.0}, head_dim=12,
                                tie_word_embeddings=True)),
    "Mistral v0.3": ("mistral", dict(rope_theta=1e6, sliding_window=None, rms_norm_eps=1e-5)),
    "Mixtral": ("mixtral", dict(rope_theta=1e6, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5,
                                output_router_logits=False, router_aux_loss_coef=0.02, sliding_window=None)),
    "Qwen2.5": ("qwen2", dict(rope_theta=1e6, tie_word_embeddings=True, use_sliding_window=False, sliding_window=32,
                              max_window_layers=21)),
    "Qwen3": ("qwen3", dict(rope_theta=1e6, head_dim=16, attention_bias=False, use_sliding_window=False)),
    "Qwen3-MoE": ("qwen3_moe", dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                                    norm_topk_prob=True, mlp_only_layers=[], decoder_sparse_step=1)),
    "Qwen3-MoE without head_dim": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)),
    "SmolLM2": ("llama", dict(tie_word_embeddings=True, rope_interleaved=False, is_llama_config=True,
                              rms_norm_eps=1e-5, rope_theta=1e5)),
}  # fmt: skip


@pytest.mark.parametrize("original", [True, False], ids=["as published", "as transformers keeps it"])
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_folder_gives_the_logits_of_transformers_and_survives_saving(name, original, tmp_path, transformers):
    kind, keys = PUBLIC[name]
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    keys = sizes | dict(num_key_value_heads=2, max_position_embeddings=64) | keys
    torch.manual_seed(2)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **keys)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:  # gains and biases away from 1 and 0
                p.add_(torch.randn(p.shape) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=original)
    published = {"model_type": kind, **keys, "architectures": ["X"], "torch_dtype": "float32"}  # the older spelling
    (tmp_path / "theirs/config.json").write_text(json.dumps(published))
    checkpoint.save(checkpoint.load(tmp_path / "theirs"), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        for logits in (checkpoint.load(tmp_path / "theirs")(IDS)[0], again(IDS).logits):
            assert (logits - theirs(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", configuration.KINDS)
def test_a_key_that_a_configuration_leaves_out_has_the_value_of_its_public_class(kind, tmp_path, transformers):
    theirs = transformers.AutoConfig.for_model(kind)
    sizes = dict(vocab_size=97, hidden_size=256, intermediate_size=80, num_hidden_layers=1, num_attention_heads=32)
    experts = dict(moe_intermediate_size=24) if kind == "qwen3_moe" else {}
    window = dict(sliding_window=None) if kind == "mistral" else {}
    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": kind, **sizes, **experts, **window}))
    ours = checkpoint.read_config(tmp_path)
    same = "max_position_embeddings rms_norm_eps num_key_value_heads tie_word_embeddings bos_token_id eos_token_id"
    for key in same.split():
        assert getattr(ours, key) == getattr(theirs, key), key
    # keys of which one value is computed: a class that has the key has that value, so leaving it out says nothing else
    for key, computed in dict(hidden_act="silu", attention_bias=False, mlp_bias=False, decoder_sparse_step=1,
                              mlp_only_layers=[], use_sliding_window=False, partial_rotary_factor=1,
                              quantization_config=None, shared_expert_intermediate_size=0).items():  # fmt: skip
        assert getattr(theirs, key, computed) == computed, key
    assert ours.rope_scaling is None and theirs.rope_parameters["rope_type"] == "default"
    assert {*(getattr(theirs, "layer_types", None) or ())} <= {"full_attention"}
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.head_dim == (theirs.head_dim if kind == "qwen3" else 256 // 32)
    if ours.experts:
        assert (ours.experts, ours.top_k) == (theirs.num_local_experts, theirs.num_experts_per_tok)
        assert ours.balance_coef == theirs.router_aux_loss_coef * theirs.num_experts_per_tok
        assert ours.router == configuration.ROUTER[getattr(theirs, "norm_topk_prob", True)]
    if kind == "mistral":  # its class slides by default
        tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": kind, **sizes}))
        with pytest.raises(ValueError, match="sliding_window 4096"):
            checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("kind", ["llama, tied", "mixtral"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_tied_configuration_beside_another_head_is_refused_and_beside_the_same_one_loads(kind, sharded, tmp_path):
    checkpoint.save(make(kind, tie_word_embeddings=True), tmp_path)
    files = {"model.safetensors": load_file(tmp_path / "model.safetensors")}
    if sharded:  # the head in a file of its own
        (tmp_path / "model.safetensors").unlink()
        files = {"a.safetensors": files["model.safetensors"], "b.safetensors": {}}
    *_, (last, state) = files.items()
    head, embedding = "lm_head.weight", next(iter(files.values()))["model.embed_tokens.weight"]

    def write(weight):
        state[head] = weight
        for file, tensors in files.items():
            save_file(tensors, tmp_path / file, {"format": "pt"})
        where = {name: file for file, tensors in files.items() for name in tensors}
        if sharded:
            checkpoint.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": where})

    write(embedding.clone())
    checkpoint.load(tmp_path)
    write(embedding.double())
    checkpoint.load(tmp_path)
    write(embedding + 1)
    with pytest.raises(ValueError, match=r"lm_head.weight is not its embedding.*\(tie_word_embeddings false"):
        checkpoint.load(tmp_path)
    edit(tmp_path, tie_word_embeddings=False)
    assert torch.equal(checkpoint.load(tmp_path).lm_head.weight, embedding + 1)  # the way out


def test_a_folder_of_two_steps_is_refused_whoever_loads_it(tmp_path):
    checkpoint.save(make("llama"), tmp_path, step=4)
    checkpoint.write_json(tmp_path / "run.json", {"step": 4, "lineage": [{"step": "train", "tokens": 1}]})
    checkpoint.load(tmp_path)
    torch.save({"format": 1, "step": 3}, tmp_path / "trainer.pt")
    with pytest.raises(ValueError, match="killed while saving"):
        checkpoint.load(tmp_path)
    torch.save({"format": 1, "step": 4}, tmp_path / "trainer.pt")
    checkpoint.write_json(tmp_path / "run.json", {"step": 3, "lineage": [{"step": "train", "tokens": 1}]})
    with pytest.raises(ValueError, match="killed while saving"):
        checkpoint.load(tmp_path)


# ---- names of public models -----------------------------------------------------------------------------------------


def test_a_public_name_is_found_in_the_hubs_own_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--small-1.5B/snapshots" / commit
    checkpoint.save(make("qwen2"), snapshot)
    (tmp_path / "models--org--small-1.5B/refs").mkdir()
    (tmp_path / "models--org--small-1.5B/refs/main").write_text(commit)
    folder = checkpoint.find("org/small-1.5B")
    assert folder == snapshot and checkpoint.load(folder).config.qkv_bias
    assert checkpoint.read_lineage(folder)[1] == [{"step": "source", "name": "org/small-1.5B", "tokens": None}]


def test_no_weights_are_fetched_twice(tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    theirs = ["README.md", "config.json", "consolidated.safetensors", "model-00001-of-00002.safetensors", "params.json",
              "model.safetensors.index.json", "original/consolidated.00.pth", "original/params.json", "tokenizer.json",
              "tokenizer.model.v3", "LICENSE.txt", "model.gguf"]  # fmt: skip

    def snapshot_download(name, **patterns):
        fetched.extend(filter_repo_objects(theirs, **patterns))
        return tmp_path

    fetched = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert checkpoint.find("org/some") == tmp_path
    assert set(theirs) - set(fetched) == {"README.md", "consolidated.safetensors", "original/consolidated.00.pth",
                                          "original/params.json", "model.gguf"}  # fmt: skip


def test_a_name_that_is_nowhere_is_one_clear_line(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="org/nothing is no folder, and the hub did not give it") as error:
        checkpoint.find("org/nothing")
    assert "\n" not in str(error.value)
    for name in (tmp_path, "a/b/c", "alone", "../up"):  # not a public name: whoever opens it says what is wrong
        assert checkpoint.find(name) == type(tmp_path)(name)
