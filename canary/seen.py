"""Which canaries a model was actually trained on, and which file the generator of a text was trained on."""

from pathlib import Path
from typing import Any

from canary.key import KeyLine
from common import chat, models, tokenization, trained


class Seen:
    """The rows that a model was trained on, from its trained_rows.jsonl."""

    def __init__(self, rows: trained.TrainedRows, tokenizer: Any, whole: bool = False):
        self.max_length, self.tokenizer, self.whole = rows.max_length, tokenizer, whole
        self.by_index = {row.row: row for row in rows.rows}

    @classmethod
    def of(cls, checkpoint: str, tokenizer: Any, whole: bool = False) -> "Seen | None":
        """None if unknown: a model from another tool, a merged model, an older run."""
        if not Path(checkpoint).is_dir() or (rows := trained.read(checkpoint)) is None:
            return None
        if tokenizer is None and (Path(checkpoint) / "tokenizer_config.json").is_file():
            tokenizer = models.load_tokenizer(models.ModelRef(checkpoint, checkpoint, None, None))
        return cls(rows, tokenizer, whole)

    def copies(self, canary: KeyLine) -> int:
        """Number of rows in which the loss was taken on every character of the canary's secret."""
        offset, length = len(canary["before"]), len(canary["secret"])
        starts = canary.get("starts") or [len(canary["context"])] * len(canary["rows"])
        spans = [(start + offset, start + offset + length) for start in starts]
        return sum(
            index in self.by_index and self.by_index[index].covers(*span)
            for index, span in zip(canary["rows"], spans, strict=True)
        )

    def secret_tokens(self, canary: KeyLine) -> tuple[int, int] | None:
        """(number of tokens of the secret in the canary's first row, number that the loss was taken on); None without a
        tokenizer."""
        if self.tokenizer is None:
            return None
        text, start = canary["context"] + canary["sentence"], len(canary["context"]) + len(canary["before"])
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not self.whole, verbose=False)
        offsets = encoded["offset_mapping"][: len(tokenization.without_end(self.tokenizer, encoded["input_ids"]))]
        first, end = chat.token_span(offsets, start, start + len(canary["secret"]))
        row = self.by_index.get(canary["rows"][0]) if canary["rows"] else None
        return end - first, sum(row is not None and row.covers(*span) for span in offsets[first:end])

    def fits(self, canary: KeyLine) -> bool:
        """Whether --max_length leaves the canary whole in its row; depends only on the text, inserted or not."""
        if self.tokenizer is None:
            return True
        ids = tokenization.encode_texts(self.tokenizer, [canary["context"] + canary["sentence"]], self.whole)[0]
        return len(tokenization.without_end(self.tokenizer, ids)) < self.max_length


def text_trained_on(manifest: dict[str, Any], sha256: str) -> bool | None:
    """Whether the generator of a text was trained on the file with this SHA-256; None if unknown.

    Known from the run.json of its checkpoint; if that is gone, from the manifest's second source (--training of
    data/synthetic/generate.py).
    """
    model = (manifest.get("generator") or {}).get("model")
    known = trained.trained_on(model, sha256) if model else None
    sources: list[dict[str, Any]] = manifest.get("source") or []
    training = sources[1] if len(sources) > 1 else {}
    if known is None and training.get("sha256") and not training.get("salted"):  # the salt is lost with the model's run
        return bool(training["sha256"] == sha256)
    return known
