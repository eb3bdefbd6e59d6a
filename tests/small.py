"""The smallest model and tokenizer that will do."""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

VOCABULARY = 64


class Bigram(nn.Module):
    """A causal LM whose logits are a linear layer on an embedding."""

    def __init__(self, seed: int | None = None):
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))

    def get_input_embeddings(self):
        return self.embedding


def word_tokenizer(words: Iterable[str], unknown: str, split: Any = None, **special: str) -> Any:
    """A tokenizer whose ids are the places of words, which stand between spaces unless `split` says otherwise."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    made.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def byte_tokenizer(vocabulary: int = 257, eos: bool = True) -> Any:
    """Every byte is a token: 0 is EOS, the others follow; `vocabulary` is filled with tokens that never occur."""
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"unused {i}": i for i in range(len(vocab), vocabulary)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **({"eos_token": "<|endoftext|>"} if eos else {}))
