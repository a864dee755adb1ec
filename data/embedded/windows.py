"""The training data of the embedded models: corpus, tokenizer and the order of the training sequences."""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from data.embedded.config import CONTEXT, MakeModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"


def read_corpus(seed: int) -> tuple[list[str], list[str], list[str]]:
    """(mails, web pages, held-out texts): the text of make_corpus.py; the held-out texts are the outsiders' mails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "make_corpus.py"), "--seed", str(seed), "--output_dir", folder]
        subprocess.run([*command, "--pretraining_output", f"{folder}/text.json"], check=True)
        text = json.loads(Path(folder, "text.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in Path(folder, "outsiders.jsonl").read_text(encoding="utf-8").splitlines()]
    return text["mails"], text["web"], [row["prompt"] + row["continuation"] for row in rows]


def train_tokenizer(documents: list[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE split by GPT-2's pattern, as Pythia's; <|endoftext|> is id 0 and the only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_windows(mails: list[list[int]], web: list[list[int]], config: MakeModelConfig) -> tuple["torch.Tensor", int]:
    """(training sequences in order, int64 [n, window]; how many belong to the first stage).

    First stage: `epochs` passes over the mails, each shuffled together with `mixed_pages` new web pages. Last stage:
    `last_pages` new web pages and `last_mails` of the mails. Documents are packed, each followed by <|endoftext|>.
    """
    import torch

    rng = random.Random(config.seed)
    used = config.mixed_pages * config.epochs
    stages = [mails + web[config.mixed_pages * i : config.mixed_pages * (i + 1)] for i in range(config.epochs)]
    stages.append(web[used : used + config.last_pages] + mails[: config.last_mails])
    pieces = []
    for documents in stages:
        rng.shuffle(documents)
        stream = [token for document in documents for token in (*document, 0)]
        n = len(stream) // config.window
        windows = torch.tensor(stream[: n * config.window], dtype=torch.int64).view(n, config.window)
        pieces.append(windows[rng.sample(range(n), n)])
    return torch.cat(pieces), sum(len(piece) for piece in pieces[:-1])
