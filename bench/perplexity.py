"""Compare perplexity scoring with the plain padded loop that users copy from the Hugging Face `evaluate` metric.

python bench/perplexity.py                                     # a small random Llama
python bench/perplexity.py --model ./SmolLM2-135M --documents 96
python bench/perplexity.py --peer_padding set                  # the peer pads like the metric, to the longest text

Both sides score the same token sequences (with start token) with the same model in one process, alternating; the median
of --runs is reported. The peer: batches of 16 in file order, right-padded, with attention mask, fp32 logits of the
whole batch, cross-entropy over all positions, then the mask. The metric itself pads every text to the longest of all
texts; by default the peer pads only to the longest of each batch, which favours it. Lengths are heavy-tailed like those
of mail: a quoted part of up to 200 tokens, then log-normal text; every text is invented. Cross-entropy copies the
peer's logits, so it needs several times the memory that is printed for them: lower --longest if that is too much.
"""

import statistics
import sys
import time

from common import cli
from common.problems import Problems
from common.process import entry

BATCH = 16
TARGET = 2.5


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Time perplexity scoring against a plain padded batch-16 loop.",
        "python bench/perplexity.py --model ./SmolLM2-135M --documents 96",
    )
    parser.add_argument("--model", default=None, help="model directory; None: a random Llama of the sizes below")
    parser.add_argument("--hidden_size", type=cli.positive_int, default=256, help="of the random Llama")
    parser.add_argument("--layers", type=cli.positive_int, default=4, help="of the random Llama")
    parser.add_argument("--vocabulary", type=cli.positive_int, default=32000, help="of the random Llama")
    parser.add_argument("--documents", type=cli.positive_int, default=64, help="texts to score")
    parser.add_argument("--median", type=cli.positive_int, default=150, help="median tokens after the quoted part")
    parser.add_argument("--sigma", type=cli.positive_float, default=1.0, help="standard deviation of their logarithm")
    parser.add_argument("--longest", type=cli.positive_int, default=2000, help="maximum tokens per text")
    parser.add_argument(
        "--peer_padding",
        choices=("batch", "set"),
        default="batch",
        help="whether the peer pads to the longest text of each batch or of the set",
    )
    parser.add_argument(
        "--token_budget", type=cli.positive_int, default=None, help="budget of ours (default: as perplexity.py)"
    )
    parser.add_argument("--runs", type=cli.positive_int, default=3, help="alternating runs; the median is reported")
    parser.add_argument("--seed", type=int, default=3407, help="seed of lengths, texts and random weights")
    return parser


def mail_lengths(n: int, median: int, sigma: float, longest: int, seed: int) -> list[int]:
    """Token counts of n mails: a quoted part of 20 … 200 plus log-normal text, truncated at `longest`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 201, size=n) + rng.lognormal(np.log(median), sigma, size=n)
    return [int(length) for length in np.minimum(lengths, longest)]


def random_model(args):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    heads = max(1, args.hidden_size // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.hidden_size,
            intermediate_size=4 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=args.longest + 1,
        )
    )


def random_tokens(lengths: list[int], vocabulary: int, seed: int) -> list[list[int]]:
    """Start token 1, then tokens drawn from a Zipf distribution."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [[1, *(rng.zipf(1.2, size=length) % (vocabulary - 3) + 3).tolist()] for length in lengths]


def invented_mail(lengths: list[int], tokenizer, seed: int) -> list[list[int]]:
    """Start token, then invented prose, truncated to each length."""
    from faker import Faker

    fake = Faker("en_US")
    fake.seed_instance(seed)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    sequences = []
    for length in lengths:
        text = f"From: {fake.name()}\nSubject: {fake.sentence()}\n\n" + fake.paragraph(length // 4 + 20)
        sequences.append([start, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:length]])
    return sequences


def plain_loop(model, sequences: list[list[int]], width: int) -> list[float]:
    """The peer: the perplexity of each sequence. `width` 0 pads a batch to its own longest sequence."""
    import torch

    loss, perplexities = torch.nn.CrossEntropyLoss(reduction="none"), []
    for begin in range(0, len(sequences), BATCH):
        batch = sequences[begin : begin + BATCH]
        columns = width or max(map(len, batch))
        ids = torch.tensor([tokens + [0] * (columns - len(tokens)) for tokens in batch])
        mask = torch.tensor([[1] * len(tokens) + [0] * (columns - len(tokens)) for tokens in batch])
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        nll = loss(logits[:, :-1].transpose(1, 2), ids[:, 1:])
        perplexities += torch.exp((nll * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).tolist()
    return perplexities


def ours(model, sequences: list[list[int]], token_budget: int) -> list[float]:
    import numpy as np

    from common.scoring import join, score

    logps = join(sequences, [score(model, sequences, token_budget=token_budget)])
    return [float(np.exp(-np.mean(logp, dtype=np.float64))) for logp in logps]


def run(args) -> float:
    """Print both times and their ratio, and return it. Raises if the two mean perplexities differ."""
    from common import limits, models
    from common.scoring import LOGIT_VALUES, SMALLEST_CHUNK, TOKEN_BUDGET

    problems = Problems()
    ref = problems.absorb(models.find_model, args.model) if args.model else None
    problems.check()

    import torch

    if ref:
        tokenizer = models.load_tokenizer(ref)
        model = models.load_base(ref, torch.float32, "cpu")
        args.longest = min(args.longest, limits.context_length(model) - 1)
    else:
        model = random_model(args).eval()
    lengths = mail_lengths(args.documents, args.median, args.sigma, args.longest, args.seed)
    vocabulary = model.config.vocab_size
    sequences = invented_mail(lengths, tokenizer, args.seed) if ref else random_tokens(lengths, vocabulary, args.seed)
    widths = sorted(map(len, sequences))
    budget = args.token_budget or TOKEN_BUDGET
    width = widths[-1] if args.peer_padding == "set" else 0
    batches = [sequences[begin : begin + BATCH] for begin in range(0, len(sequences), BATCH)]
    positions = sum(len(batch) * (width or max(map(len, batch))) for batch in batches)
    largest = max(len(batch) * (width or max(map(len, batch))) for batch in batches)
    n_tokens = sum(widths)
    print(f"model {args.model or 'random Llama'}, vocabulary {vocabulary}, {torch.get_num_threads()} threads")
    print(f"{len(sequences)} texts, {n_tokens} tokens: median {widths[len(widths) // 2]}, longest {widths[-1]}")
    chunk = max(LOGIT_VALUES, SMALLEST_CHUNK * vocabulary)
    print(f"peer: {positions} positions, {positions / n_tokens:.2f} per token")
    print(f"fp32 logits: peer up to {largest * vocabulary * 4 / 2**20:.0f} MiB, ours {chunk * 4 / 2**20:.0f} MiB")

    sides = {
        "peer": lambda chosen: plain_loop(model, chosen, width),
        "ours": lambda chosen: ours(model, chosen, budget),
    }
    wall, processor, means = {"peer": [], "ours": []}, {"peer": [], "ours": []}, {}
    for score_all in sides.values():
        score_all(sequences[:2])  # first calls are slower
    for number in range(1, args.runs + 1):
        for name, score_all in sides.items():
            started, processor_started = time.perf_counter(), time.process_time()
            means[name] = statistics.fmean(score_all(sequences))
            wall[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - processor_started)
        print(f"run {number}: peer {wall['peer'][-1]:.2f} s, ours {wall['ours'][-1]:.2f} s", flush=True)
    if abs(means["peer"] / means["ours"] - 1) > 1e-4:
        raise AssertionError(f"mean perplexities differ: peer {means['peer']}, ours {means['ours']}")
    peer, mine = (statistics.median(wall[name]) for name in sides)
    print(f"mean perplexity: peer {means['peer']:.6g}, ours {means['ours']:.6g}")
    print(f"median: peer {peer:.2f} s, ours {mine:.2f} s ({n_tokens / mine:.0f} tokens/s)")
    print(f"ratio {peer / mine:.2f} (target {TARGET}); by CPU time {_ratio(processor):.2f}")
    return peer / mine


def _ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(seconds["peer"]) / statistics.median(seconds["ours"])


def main(argv=None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
