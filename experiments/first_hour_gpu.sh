#!/usr/bin/env bash
# What to run first on a machine with a GPU: about ten minutes, and one table to paste into an issue or into LOG.md.
#
#     bash experiments/first_hour_gpu.sh          # SMALL=1: tiny sizes, also on a CPU
#
# 1. Are blocks compiled once? Recompilations and graph breaks of a short run, as torch reports them: both should be 0
#    (on a CPU a mixture is cut around its dispatch).
# 2. Does the grouped product of a mixture give what the plain loop gives, idle experts included?
# 3. Does a training step wait for the device anywhere but where it logs?
# 4. Tokens a second, MFU and peak memory: dense 0.13 B and 1 B, and 8x2 mixtures. The largest has 6 B parameters: it
#    needs 80 GB of GPU memory, 50 GB of memory and 100 GB in /tmp, and what does not fit is a row that says so.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
small=${SMALL:+--small}
tiny=${SMALL:+--hidden-size 32 --num-hidden-layers 2 --context 32 --batch-tokens 256 --tokens 2560 --eval-tokens 320 --data train.py}

echo "== 1. graphs"
for experts in 0 8; do
    TORCH_LOGS=recompiles,graph_breaks python train.py --compile ${tiny:---tokens 40960 --eval-tokens 1280} \
        --experts $experts --out "$out/graphs-$experts" > "$out/log" 2>&1 || { tail -20 "$out/log"; exit 1; }
    echo "experts $experts: recompilations $(grep -c -i 'recompiling function' "$out/log" || true)," \
        "graph breaks $(grep -c -i 'graph break' "$out/log" || true)"
done
echo "== 2. grouped against the loop"
python experiments/first_hour_gpu.py grouped $small
echo "== 3. waits"
python experiments/first_hour_gpu.py waits $small
echo "== 4. speed"
echo "| model | device | N_total | tokens/s | MFU | peak memory, GB |"
echo "|---|---|---|---|---|---|"
for model in 0.13B 1B 8x0.13B 8x1B; do
    python experiments/first_hour_gpu.py speed $model --out "$out/$model" $small 2> "$out/error" | tail -1 ||
        echo "| $model | failed: $(tail -1 "$out/error") | | | | |"
    rm -rf "$out/$model"
done
