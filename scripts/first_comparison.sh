#!/usr/bin/env bash
# SmolLM2-135M with four prompting strategies, and after a few steps of SFT,
# STaR, GRPO and ThinkTuning on GSM8K, on five benchmarks.
#   scripts/first_comparison.sh path/to/gsm8k/train.jsonl path/to/benchmarks
set -euo pipefail
train=$(realpath "$1") benchmarks=$(realpath "$2")
cd "$(dirname "$0")/.."
results=docs/results/comparison
fit() {  # name, configuration, options; a finished run is left alone
    local root=runs/first_comparison/$1 config=$2
    shift 2
    [ -e "$root/finished" ] && return
    rm -rf "$root"
    .venv/bin/thinktuning fit --config "$config" \
        --data.source "$train" --trainer.default_root_dir "$root" "$@"
    touch "$root/finished"
}
fit sft $results/sft.yaml
fit star $results/star.yaml
fit grpo configs/word_problems.yaml --guidance.gamma.start 0
fit thinktuning configs/word_problems.yaml
files=()
for name in gsm8k arc_challenge commonsense_qa strategyqa mmlu_pro; do
    files+=("$name=$benchmarks/$name.jsonl")
done
.venv/bin/thinktuning compare --config $results/compare.yaml \
    --benchmarks "[$(IFS=,; echo "${files[*]}")]"
cp -r runs/first_comparison/report/{report.html,report.md,report.csv,plots} $results/
