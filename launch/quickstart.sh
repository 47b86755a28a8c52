#!/usr/bin/env bash
# Trains a model that captions new pictures, from scratch: set-up, shards, tokenizer, training, evaluation.
# A second run continues the first; delete data/synthetic and runs/quickstart to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
step() { printf '\n== %s\n' "$*"; }

data=data/synthetic
run=runs/quickstart
if [ ! -d "$data/videos_eval" ]; then
  step "Shards: small scenes with known truth, images and videos ($data)"
  python -m data_tools.synthetic --output "$data"
fi
if [ ! -f "$data/tokenizer.model" ]; then
  step "Tokenizer ($data/tokenizer.model)"
  python -m data_tools.tokenizer train --data "$data/images_train" "$data/videos_train" \
    --output "$data/tokenizer.model" --vocab-size 1024
fi

gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
ranks=$(( gpus > 0 ? gpus : 2 ))
step "Training on $ranks ranks ($run)"
deepspeed --log_level warning --num_accelerators "$ranks" launch/train.py --deepspeed ds_configs/moe.json

step "Captions of held-out scenes"
python launch/evaluate.py --run "$run"

step "Where to look"
echo "run directory:  $run"
echo "TensorBoard:    .venv/bin/tensorboard --logdir runs/"
echo "one picture:    .venv/bin/python launch/generate.py caption --run $run --image FILE"
