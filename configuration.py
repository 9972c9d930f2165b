"""config.json: the Hugging Face configuration of a model, and the Config of model.py that says the same.

`from_public` reads what Meta, Mistral and Qwen publish. Of the keys that change what is computed it lists the values
that model.py can compute, and refuses others by name. A key that the file leaves out counts as its public class would
fill it in (`KINDS`). `public_config` writes the plainest public kind that can say what a Config says.

The one key of ours is `granularity` (missing: 1), which other readers ignore. The file counts experts after the cut, as
other readers must: 8 experts of granularity 4 are 32 of a quarter's width there. A Config counts them before it.
"""

from model import Config

KINDS = {  # model_type: keys that a configuration may leave out, and what its public class takes then
    "llama": dict(max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=1e4, num_key_value_heads=None,
                  bos_token_id=1, eos_token_id=2),
    "mistral": dict(max_position_embeddings=131072, rms_norm_eps=1e-6, rope_theta=1e4, num_key_value_heads=8,
                    sliding_window=4096, bos_token_id=1, eos_token_id=2),
    "qwen2": dict(max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e4, num_key_value_heads=32),
    "qwen3": dict(max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e4, num_key_value_heads=32,
                  head_dim=128),
    "mixtral": dict(max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=1e6, num_key_value_heads=8,
                    num_local_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.001, bos_token_id=1,
                    eos_token_id=2, granularity=1),
    "qwen3_moe": dict(max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e4, num_key_value_heads=4,
                      num_experts=128, num_experts_per_tok=8, router_aux_loss_coef=0.001, norm_topk_prob=False,
                      granularity=1),
}  # fmt: skip
FRACTIONS = "rms_norm_eps", "rope_theta", "router_aux_loss_coef"  # other numbers are whole
# By norm_topk_prob. If it is true, scores are divided by the sum of the chosen: a softmax over the chosen logits.
ROUTER = {True: "topk-softmax", False: "softmax-topk"}
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"


def from_public(h, path):
    """The Config of a Hugging Face configuration `h` (dict). ValueError, which names the file `path`, for what model.py
    cannot compute."""
    kind = h.get("model_type")

    def refuse(what):
        raise ValueError(f"{path}: {what}")

    def need(*names):
        for name in names:
            if h.get(name) is not None:
                if not isinstance(h[name], (int, float) if name in FRACTIONS else int):
                    refuse(f"{name} is {h[name]!r} (a {'number' if name in FRACTIONS else 'whole number'})")
                return h[name]
        refuse(f"{names[0]} is missing")

    if kind not in KINDS:
        refuse(f"model_type {kind!r} is not supported ({', '.join(KINDS)})")
    given, h = h, KINDS[kind] | ({"num_local_experts": h["num_experts"]} if "num_experts" in h else {}) | h
    for key, fine in dict(
        hidden_act=("silu", None), attention_bias=(False, None), mlp_bias=(False, None), quantization_config=(None,),
        partial_rotary_factor=(1, None), decoder_sparse_step=(1, None), mlp_only_layers=([], None),
        shared_expert_intermediate_size=(0, None), n_shared_experts=(0, None), tie_word_embeddings=(False, True, None),
    ).items():  # fmt: skip
        if h.get(key) not in fine:
            refuse(f"{key} {h[key]!r} is not supported ({fine[0]!r} is)")
    switch = kind.startswith("qwen")  # only these have one
    if h.get("sliding_window") is not None and (not switch or h.get("use_sliding_window")):
        right = "null" + ", or use_sliding_window false" * switch
        refuse(f"sliding_window {h['sliding_window']} is not supported ({right})")
    if any(t != "full_attention" for t in h.get("layer_types") or ()):
        refuse("layer_types other than full_attention are not supported")

    rope = read_rope(given, refuse)
    config = Config(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        intermediate_size=need("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        num_hidden_layers=need("num_hidden_layers"),
        num_attention_heads=need("num_attention_heads"),
        num_key_value_heads=need("num_key_value_heads", "num_attention_heads"),
        head_dim=h.get("head_dim") or need("hidden_size") // need("num_attention_heads"),
        max_position_embeddings=need("max_position_embeddings"),
        rms_norm_eps=need("rms_norm_eps"),
        rope_theta=float(rope.get("rope_theta") or KINDS[kind]["rope_theta"]),
        rope_scaling={k: rope[k] for k in ("rope_type", *LLAMA3)} if rope["rope_type"] == "llama3" else None,
        tie_word_embeddings=bool(h.get("tie_word_embeddings")),
        qk_norm=kind.startswith("qwen3"),
        qkv_bias=kind == "qwen2",
        bos_token_id=h.get("bos_token_id"),
        eos_token_id=h.get("eos_token_id"),
        pad_token_id=h.get("pad_token_id"),
    )
    if kind in ("mixtral", "qwen3_moe"):
        G = config.granularity = need("granularity")  # the file counts the G narrow parts of an expert as experts
        experts, chosen = need("num_local_experts", "num_experts"), need("num_experts_per_tok")
        if G < 1 or experts % G or chosen % G:
            refuse(f"granularity {G} does not divide {experts} experts and {chosen} a token")
        config.experts, config.top_k, config.intermediate_size = experts // G, chosen // G, config.intermediate_size * G
        config.router = ROUTER[kind == "mixtral" or bool(h["norm_topk_prob"])]
        config.balance_coef = need("router_aux_loss_coef") * chosen  # ours is a mean over choices, the public one a sum
    try:
        config.check()
    except ValueError as wrong:
        refuse(wrong)
    return config


def read_rope(h, refuse):
    """{setting of the rotation: value}. They stand in up to three places of a configuration, and readers differ in
    which they take: refused where two places disagree."""
    rope = {}
    for place in ("rope_theta", "rope_scaling", "rope_parameters"):
        found = h.get(place)
        found = {place: found} if place == "rope_theta" else found or {}
        if not isinstance(found, dict):
            refuse(f"{place} is {found!r} (an object)")
        for key, value in found.items():
            key = "rope_type" if key == "type" else key
            if value is None or (key, value) == ("partial_rotary_factor", 1):
                continue
            if key not in ("rope_type", "rope_theta", *LLAMA3):
                refuse(f"{key} in {place} is not supported")
            if key != "rope_type" and (not isinstance(value, (int, float)) or not value > 0):
                refuse(f"{key} is {value!r} (a number above 0)")
            if rope.setdefault(key, value) != value:
                refuse(f"{key} is {rope[key]!r} in one place and {value!r} in {place} (the same in both)")
    kind = rope.setdefault("rope_type", "missing" if {*rope} & {*LLAMA3} else "default")
    if kind not in ("default", "llama3"):
        refuse(f"rope_type {kind!r} is not supported (default, llama3)")
    if kind == "llama3" and not {*LLAMA3} <= {*rope}:
        refuse(f"llama3 rope scaling needs {', '.join(LLAMA3)}")
    return rope


def public_config(config, dtype):
    """The Hugging Face configuration of a Config, a dict; rotary settings and dtype in the older and newer spelling."""
    if config.experts and config.router not in ROUTER.values():
        raise ValueError(f"no public format holds the router {config.router} (a line for it here, in public_config)")
    match bool(config.experts), config.qk_norm, config.qkv_bias:  # Config.check refuses what is not here
        case False, False, False:
            kind, name, more = "llama", "Llama", {"mlp_bias": False}
        case False, False, True:
            kind, name, more = "qwen2", "Qwen2", {"sliding_window": None}
        case False, True, False:
            kind, name, more = "qwen3", "Qwen3", {"sliding_window": None}
        case True, False, False:
            kind, name, more = "mixtral", "Mixtral", {"sliding_window": None}
        case True, True, False:
            kind, name, more = "qwen3_moe", "Qwen3Moe", {"sliding_window": None}
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    same += " head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling tie_word_embeddings"
    same += " bos_token_id eos_token_id pad_token_id"
    h = {"architectures": [f"{name}ForCausalLM"], "model_type": kind, **{k: getattr(config, k) for k in same.split()}}
    h |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, **more}
    if kind == "qwen2":
        del h["attention_bias"]  # its class knows no such key: q, k and v always have a bias there
    h["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    h["torch_dtype"] = h["dtype"] = str(dtype).removeprefix("torch.")
    if config.experts:
        G = config.granularity
        width, total, chosen = config.intermediate_size // G, config.experts * G, config.top_k * G
        h |= {"num_experts_per_tok": chosen, "router_aux_loss_coef": config.balance_coef / chosen, "granularity": G}
        if kind == "mixtral":
            h |= {"num_local_experts": total, "intermediate_size": width}
        else:
            renormalised = {router: flag for flag, router in ROUTER.items()}[config.router]
            h |= {"num_experts": total, "moe_intermediate_size": width, "norm_topk_prob": renormalised}
            h |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    return h
