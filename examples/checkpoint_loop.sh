#!/usr/bin/env bash
# Train three adapters in turn, attack every checkpoint of each, and write one report. Run from the repository root.
set -euo pipefail
model=${1:-EleutherAI/pythia-1.4b}
for kind in lora dora pissa; do
    python run_peft.py --model "$model" --input data/enron.jsonl --peft_type "$kind" --learning_rate 2e-4 --resume
done
tree=./$(basename "$model")
python measure_purified.py --model "$model" --output_dir results/base
python evaluate_purified.py --model "$tree" --baseline results/base/results_purified.jsonl
python perplexity/perplexity.py --dir "$tree"
python mia/mia.py --dir "$tree" --members data/enron.jsonl
python plot_results.py "$tree" results --output report
