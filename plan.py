"""
A scaling law put to use: how large a model a budget should train, when to grow, and what to do with a model one has.

    python plan.py optimal LAW --flops 1e20 ... [--fit fit.json] [--json]
    python plan.py optimal stacking --N 8e9 --D 15e12 [--json]
    python plan.py budget --have-n 1e9 --have-d 1e12 --flops 1e21 [--experts 8 --top-k 2] [--plot plan.png] [--json]
    python plan.py budget --have out/run-1 --flops 1e13 [--fit upcycled.json --fit moe.json ...]

optimal. Training N parameters on D tokens costs about C = 6 N D FLOPs. So a budget C buys any N, with D = C / (6 N)
tokens. Along this line the loss L(N, D) = E + A N^-alpha + B D^-beta has one lowest point. There 1 % more N saves what
1 % less D costs:

    alpha A N^-alpha = beta B D^-beta                                      (Hoffmann et al. 2022, Eq. 4)

Other laws have other lines. What C buys under each law is `buys` in laws.py's table. `search` walks along them.

By hand: A = B = 100, alpha = beta = 0.5. Then the equation says N = D, so N = D = sqrt(C / 6). For C = 6 10^8 this is
10^4, and with E = 1 the loss is 3. Twice the parameters and half the tokens give 1 + 0.71 + 1.41 = 3.12 for the same C.

budget. A dense model of N parameters has read D1 tokens, and C FLOPs are left. There are four ways: train it on, make a
mixture of experts from it (upcycle), stack its layers, or start a new mixture from scratch. Each way has a law (Liew et
al. 2025, arXiv 2502.03009; none is published for stacking: it needs a fit of your own) and a price a token, so it reads
D2 = C / price tokens. The lowest loss wins, and its command is printed. The law of upcycling is

    L = A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N^-beta + E

The longer D1 was, the further ahead the mixture starts, and the more slowly it learns from D2. So one from scratch may
overtake it. The budget at which it does is the crossing.

Left out: what a FLOP costs in time (a mixture's are slower), and the price of inference.

Try:
1. `python plan.py optimal chinchilla --flops 5.76e23`, then with --set hoffmann: how many tokens a parameter does each
   ask for at Chinchilla's own budget? (18 and 59. Chinchilla was given 20: the published fit had missed its optimum.)
2. `python plan.py budget --have-n 1e9 --have-d 1e11 --flops 1e21`, then --have-d 2e11, 3e11 ...: up to which D1 does
   an MoE from scratch overtake the upcycled one? (Up to 7.3e11. With 7e11 the upcycled one is
   better again from D2 = 4.0e12 on.)
3. `python plan.py optimal joint --flops 1e21 --E 1`, then with E = 2, 4 ... 32. Which way does the best model move with
   more experts? (From 5.7e9 to 2.9e9 active parameters, and from 29 to 58 B tokens: experts bring parameters.)
"""

import inspect
import itertools
import json
import math
import signal
from pathlib import Path
from shlex import quote

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while SciPy loads: no traceback

import numpy as np
from scipy.optimize import brentq

import laws
from descent import columns, evaluate
from laws import active, band, outside, predict, published, row
from tables import DAMAGE, Commands, number, show, whole


def search(loss, at):
    """The best place: at(**place) where loss(**at(**place)) is lowest. at's defaults say what is free, as in laws.py.

    Looks at 33 places of each range, evenly on a log axis, then at 33 places of the quarter around the best, and so on.
    That finds the lowest point if there is one valley. ValueError if it lies at the end of a range.
    """
    free = {name: p.default for name, p in inspect.signature(at).parameters.items()}
    ends = {name: np.log(values) for name, values in free.items() if len(values) == 2}
    window, best = dict(ends), {}
    for _ in range(18):
        axes = {name: np.exp(np.linspace(*window[name], 33)) if name in ends else np.array(free[name]) for name in free}
        places = dict(zip(axes, np.meshgrid(*axes.values(), indexing="ij")))
        L = np.asarray(loss(**at(**places)))
        if np.isnan(L).any() or not np.isfinite(L).any():
            raise ValueError("no optimum: the law gives no numbers here (stay closer to the fitted runs)")
        best = {name: float(place.flat[L.argmin()]) for name, place in places.items()}
        for name, (low, high) in window.items():
            middle, width = math.log(best[name]), (high - low) / 8
            window[name] = np.clip([middle - width, middle + width], *ends[name])
    for name, (low, high) in ends.items():
        if not low + 1e-3 < math.log(best[name]) < high - 1e-3:
            raise ValueError(f"no optimum for {name} between {math.exp(low):.3g} and {math.exp(high):.3g}: an end is "
                             "best (give another budget, or a fit that its runs determine)")
    return at(**best)


def optimal(model, *budget, **flags):
    """The best way to spend a budget: {"N", "N_active", "N_total", "D", "G", "C", "L" ...} as far as the law has them.

    model: laws.published() or a fit. The rest is what the law's row asks for: C in FLOPs, and e.g. experts or top_k.
    stacking takes N and D of the target and gives {"d", "g"}: train a base of N / g parameters on d tokens, stack it g
    times, train on (Du et al. 2024, Eq. 2). ValueError if there is no optimum.
    """
    the, name = row(model["law"], model["set"]), f"{model['law']} {model['set']}"
    if the.buys is None:
        others = ", ".join(set for set, r in laws.LAWS[model["law"]].items() if r.buys) or "none"
        raise ValueError(f"no rule of allocation for {name} (sets of its law that have one: {others})")
    try:
        best = search(lambda **place: evaluate(the.form, model["coefficients"], **place), the.buys(*budget, **flags))
    except KeyError as column:  # the name of one that the law reads
        raise ValueError(f"no rule of allocation for {name} (its row in laws.py does not buy {column})") from None
    value = predict(model, **{c: best[c] for c in columns(the.form)})
    if the.target == "d" and value >= best["D"]:
        raise ValueError(f"the rule gives d = {value:.4g} tokens for the base, not below D = {best['D']:.4g}: out of "
                         "its range (fitted on 410M to 3B parameters: give more tokens, or choose d yourself)")
    asked_for = inspect.signature(the.buys).bind(*budget, **flags).arguments
    return {**best, **({"C": asked_for["C"]} if "C" in asked_for else {}), the.target: value}


def budget(N, D1, C, models=None, top_k=2):
    """The four ways to spend C more FLOPs (6 N_active a token) on a dense model of N parameters and D1 tokens.

    models: {set of upcycling: model}; published Table 2 if None. Losses from two sources cannot be compared, so with
    `models` a way without its own fit is None. Returns {"ways": {name: L or None}, "best", "swaps", "crossings", ...}.
    swaps: all budgets at which two ways swap places, of those that give the MoE 1e7 (or, if less, a hundredth of what C
    gives) to 1e13 tokens D2; crossings: the first.
    """
    why = "no fit of its set was given (--fit can be repeated); published rows are not mixed with fits"
    if models is None:
        models = {set: published("upcycling", set) for set, r in laws.LAWS["upcycling"].items() if r.coefficients}
        why = "the stacking paper prints no coefficients of its loss L = a C^b; its rule says when, not how far"
    moe = 6 * active(N, top_k)
    every = {  # way: (set of its law, FLOPs a token, the law's arguments after D more tokens)
        "train on": ("dense", 6 * N, lambda D: {"N": N, "D": D1 + D}),
        "upcycle": ("upcycled", moe, lambda D: {"N": N, "D1": D1, "D2": D}),
        "stack": ("stacked", 6 * laws.GROW * N, lambda D: {"N": laws.GROW * N, "D1": D1, "D2": D}),
        "MoE from scratch": ("moe", moe, lambda D: {"N": N, "D": D}),
    }
    tokens = {way: C / price for way, (_, price, _) in every.items()}
    known = {way: (models[set], at_tokens(tokens[way])) for way, (set, _, at_tokens) in every.items() if set in models}

    def loss(way, flops):
        _, price, at_tokens = every[way]
        return predict(known[way][0], **at_tokens(flops / price))

    budgets = moe * np.geomspace(min(1e7, C / moe / 100), 1e13, 601)
    curves = {way: np.array([loss(way, flops) for flops in budgets]) for way in known}
    swaps = {}
    for one, other in itertools.combinations(known, 2):
        gap, found = curves[one] - curves[other], []
        for i in np.flatnonzero(np.sign(gap[:-1]) != np.sign(gap[1:])):
            flops = brentq(lambda x, one=one, other=other: loss(one, x) - loss(other, x), budgets[i], budgets[i + 1])
            found.append({"flops": flops, "D2": flops / moe, "then": one if gap[i] > 0 else other})
        swaps[f"{one} = {other}"] = found

    ways = {way: loss(way, C) if way in known else None for way in every}
    return {
        "ways": ways,
        "best": min(known, key=ways.get),
        "crossings": {pair: found[0] if found else None for pair, found in swaps.items()},
        "swaps": swaps,
        "from": budgets[0] / moe,
        "why_null": {way: why for way in every if way not in known},
        "tokens": tokens,
        "outside": {way: outside(model, **at) for way, (model, at) in known.items()},
        "intervals": {way: band(model, lambda m, at=at: predict(m, **at)) for way, (model, at) in known.items()},
        "undetermined": {way: model.get("undetermined", []) for way, (model, _) in known.items()},
        "curves": {way: curve.tolist() for way, curve in curves.items()} | {"flops": budgets.tolist()},
    }


# ----------------------------------------------------------------------------------------------------------------------
# The command line.


def have(folder):
    """(N, tokens of the lineage, configuration, last settings, FLOPs a token of its training or None) of a dense run's
    folder. ValueError if it is none."""
    try:
        run, config = (json.loads((Path(folder) / name).read_text("utf-8")) for name in ("run.json", "config.json"))
        N, dense = number(run["N"]), run["N_total"] == run["N"]
        tokens = [step["tokens"] for step in run["lineage"] if "tokens" in step]
        D1 = None if None in tokens else number(sum(tokens))
        settings = [step["settings"] for step in run["lineage"] if "settings" in step]
        last = run["lineage"][-1]  # if it grew since it was trained, those FLOPs are of a smaller model
        price = last["flops"] / last["tokens"] if last.get("flops") and last.get("tokens") else None
        masked = last.get("operator") == "random"
    except (OSError, *DAMAGE) as wrong:
        raise ValueError(f"--have {folder} is no run's folder: {wrong} (give --have-n and --have-d)") from None
    if not dense:
        raise ValueError(f"--have {folder} is a mixture (budget starts from a dense model)")
    if masked:
        raise ValueError(f"--have {folder} has a closed mask (train.py --mask-steps opens it)")
    if D1 is None:
        raise ValueError(f"--have {folder}: nobody knows its source's tokens (give --have-n {N:.4g} and --have-d)")
    return N, D1, config, settings[-1] if settings else {}, price


def flags_like(folder, config, settings):
    """The flags that give a new model the shape of the one in a folder, its text and its tokenizer."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split()
    flags = {name: config[name] for name in names if name in config}
    flags |= {name: settings[name] for name in ("data", "context", "batch_tokens") if settings.get(name)}
    flags |= {"rope_theta": theta} if (theta := (config.get("rope_parameters") or config).get("rope_theta")) else {}
    flags |= {"tokenizer": folder} if settings.get("tokenizer", "bytes") != "bytes" else {}
    words = [f"--{name.replace('_', '-')} {quote(str(value))}" for name, value in flags.items()]
    words += ["--no-qk-norm"] * ("qwen3" not in config.get("model_type", "qwen3"))
    return " ".join(words + ["--tie-word-embeddings"] * bool(config.get("tie_word_embeddings")))


def command(way, tokens, folder, config, settings, experts, top_k):
    """What to type for one of the four ways. Without a folder, and so without a configuration, names stand for them."""
    tokens = f"{max(1, round(tokens)):.4g}"
    how = {"train on": "", "upcycle": f" --upcycle {experts}x{top_k}", "stack": f" --stack {laws.GROW}"}
    if way in how:
        step = f" --batch-tokens {settings['batch_tokens']}" if "batch_tokens" in settings else ""
        return f"python train.py --init {quote(folder) if folder else 'FOLDER'}{how[way]}{step} --tokens {tokens}"
    shape = flags_like(folder, config, settings) if folder else "SHAPE"
    return f"python train.py {shape} --experts {experts} --top-k {top_k} --tokens {tokens}"


def run_optimal(args):
    model = laws.chosen_model(args)
    the = row(args.law, model["set"])
    flags = laws.asked(args, the.buys) if the.buys else {}  # without it optimal() says so
    try:
        best = optimal(model, **flags)
    except ValueError as wrong:
        names = ", ".join(model.get("undetermined", []))
        raise ValueError(f"{wrong}" + f" (the fit's runs do not determine {names})" * bool(names)) from None
    ends = band(model, lambda m: list(optimal(m, **flags).values()))  # the same over the refits
    bands = dict(zip(best, zip(*ends))) if ends else {}
    bands = {name: list(pair) for name, pair in bands.items() if name not in flags and name not in ("C", "g")}
    factors = outside(model, **{c: best[c] for c in columns(the.form)})
    if args.json:
        return best | {"intervals": bands, "outside": factors, "wrong": model.get("wrong", ""),
                       "undetermined": model.get("undetermined", [])}
    show([["", "best", "95 % interval"]] + [[name, float(v), bands.get(name) or ""] for name, v in best.items()])
    laws.warn(model, factors)


def run_budget(args):
    models = {} if args.fit else None
    for path in args.fit or []:
        report = laws.load_fit(path)
        if report["law"] != "upcycling" or report["set"] in models:
            raise ValueError(f"--fit {path} is a fit of {report['law']} {report['set']} (one of each set of upcycling)")
        models[report["set"]] = report
    config, settings, price = {}, {}, None
    if args.have:
        if args.have_n or args.have_d:
            raise ValueError(f"--have {args.have} says what --have-n and --have-d would (leave them out)")
        args.have_n, args.have_d, config, settings, price = have(args.have)
    if not (args.have_n and args.have_d and args.flops):
        raise ValueError("budget needs --flops, and --have FOLDER or both --have-n and --have-d")
    if args.top_k > args.experts:
        raise ValueError(f"--top-k {args.top_k:g} of --experts {args.experts:g} (at most as many as there are)")
    answer = budget(args.have_n, args.have_d, args.flops, models, args.top_k)
    best = answer["best"]
    answer["command"] = command(best, answer["tokens"][best], args.have, config, settings, args.experts,
                                args.top_k)  # fmt: skip
    answer["notes"] = [] if models else [laws.LAWS["upcycling"]["upcycled"].wrong]
    if not models and (args.experts, args.top_k) != (8, 2):
        answer["notes"].append("the published rows are of 8 experts, top-2. --top-k changes FLOPs, not coefficients")
    if price:
        spent = f"of this model {price:.3g} FLOPs a token, where 6 N is {6 * args.have_n:.3g}"
        answer["notes"].append(f"train.py counts head and attention, too: {spent}")
    if args.plot:
        import plots

        plots.plot_budget(args.plot, answer, args)
    del answer["curves"]
    if args.json:
        return answer
    print(f"dense, {args.have_n:.3g} parameters, {args.have_d:.3g} tokens so far; {args.flops:.3g} FLOPs to spend\n")
    show([["way", "new tokens", "L", "95 % interval", ""]] + [
        [way, answer["tokens"][way], L, answer["intervals"].get(way) or "", "<- best" * (way == answer["best"])]
        for way, L in answer["ways"].items()])
    print()
    for pair, swaps in answer["swaps"].items():
        for x in swaps:
            where = f"{'again ' * (x is not swaps[0])}at {x['flops']:.4g} FLOPs (D2 of the MoE {x['D2']:.4g})"
            print(f"{pair}: {where}; beyond it {x['then']} is better")
        if not swaps:
            print(f"{pair}: not from D2 = {answer['from']:.3g} to 1e13")
    for way, factors in answer["outside"].items():
        laws.warn({"undetermined": answer["undetermined"][way]}, factors, f"{way}: ")
    for note in [f"{way}: {why}" for way, why in answer["why_null"].items()] + answer["notes"]:
        print(f"! {note}")
    print(f"\nnext:\n  {answer['command']}")


def main(argv=None):
    parser = Commands("plan.py", "plan.py {optimal,budget} ... [--help]", __doc__, "laws and sets: laws.py --help")
    sub = parser.command(run_optimal, "LAW [options]", "the best way to spend a budget")
    laws.law_flags(sub, [r.buys for rows in laws.LAWS.values() for r in rows.values() if r.buys])

    sub = parser.command(run_budget, "(--have FOLDER | --have-n PARAMS --have-d TOKENS) --flops C [options]",
                         "train on, upcycle, stack, or start an MoE from scratch?", "the ways against the budget")
    add = sub.add_argument_group("what you have").add_argument
    add("--have", metavar="FOLDER", help="a dense run's folder, which says its size and tokens")
    add("--have-n", type=number, metavar="N", help="without --have: size of the dense model, in parameters")
    add("--have-d", type=number, metavar="D1", help="without --have: its tokens so far")
    add("--flops", type=number, metavar="C", help="FLOPs from here on, 6 N_active a token (required)")
    add = sub.add_argument_group("what it may become").add_argument
    add("--experts", type=whole, default=8, help="experts of the MoE, in the printed command (default: 8)")
    add("--top-k", type=whole, default=2, help="experts a token, sets N_active (default: 2)")
    add = sub.add_argument_group("coefficients").add_argument
    add("--fit", action="append", metavar="FILE", help="fit JSON of an upcycling set; repeat for others")
    with np.errstate(all="ignore"):  # what comes out infinite is refused in words
        parser.answer(argv)


if __name__ == "__main__":
    main()
