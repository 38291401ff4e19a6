#!/usr/bin/env bash
# docs/results/first-run.md: configs/word_problems.yaml for 40 rollout batches of GSM8K.
#   scripts/first_run.sh path/to/gsm8k/train.jsonl
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/thinktuning fit --config configs/word_problems.yaml --data.source "$1" --data.limit null \
    --trainer.max_steps 40 --checkpoint.every_n_train_steps 10 \
    --trainer.default_root_dir runs/first-run
run=$(ls -d runs/first-run/version_* | sort -V | tail -n 1)
.venv/bin/python scripts/report_run.py "$run" docs/results/first-run
