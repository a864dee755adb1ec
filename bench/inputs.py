"""What the benches of training share: a random model of a given size."""

from pathlib import Path


def make_model(folder: Path, vocabulary: int, hidden_size: int, layers: int, *, positions: int, seed: int) -> int:
    """Save a random GPT-NeoX whose tokenizer gives one token a word (w2, w3, …); returns its parameters."""
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

    transformers.logging.disable_progress_bar()
    words = {"<|endoftext|>": 0, "<|padding|>": 1} | {f"w{index}": index for index in range(2, vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<|padding|>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>", model_max_length=positions
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    return sum(item.numel() for item in model.parameters())
