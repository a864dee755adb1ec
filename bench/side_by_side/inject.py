"""memaudit's canaries into chat rows, as the example in its README does; run in memaudit's own environment.

python bench/side_by_side/inject.py --model base --data train.jsonl --output trained.jsonl --manifest manifest.json

32 candidates, of which a coin includes about half, 1, 4 and 16 times; 100 controls; family high_ppl; seed 0. Without a
model, as in the example, the secrets of that family are drawn uniformly from the vocabulary.
"""

import argparse
import json


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Insert memaudit's canaries into chat rows.")
    parser.add_argument("--model", required=True, help="for its tokenizer")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--manifest", required=True)
    args = parser.parse_args(argv)
    import memaudit
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.data, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    canaries = memaudit.generate_canaries(
        tokenizer, n=32, n_controls=100, family="high_ppl", repetitions=(1, 4, 16), seed=0
    )
    merged, manifest = memaudit.inject(rows, canaries, fmt="auto", seed=0)
    with open(args.output, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in merged)
    with open(args.manifest, "w", encoding="utf-8") as file:
        json.dump(manifest, file)
    facts = {key: manifest[key] for key in ("n_candidates", "n_controls", "n_inserted_canaries", "n_inserted_records")}
    print(json.dumps(facts | {"rows": len(merged), "warnings": manifest["warnings"]}))


if __name__ == "__main__":
    main()
