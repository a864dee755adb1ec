#!/usr/bin/env bash
# All GPUs of one node: the base is sharded across them, the adapter replicated. Run from the repository root.
set -euo pipefail
gpus=$(nvidia-smi --list-gpus | wc -l)
torchrun --standalone --nproc_per_node="$gpus" run_peft.py --model EleutherAI/pythia-12b --input data/enron.jsonl \
    --distribution_type fsdp --gradient_checkpointing --learning_rate 2e-4
torchrun --standalone --nproc_per_node="$gpus" evaluate_purified.py --model ./pythia-12b
