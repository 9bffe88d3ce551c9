"""CLIP and T5 tokenizers built from a list of words, without a download.

Known words are one token each. Other text is split into smaller pieces (CLIP: bytes, T5: characters), so any prompt can
be tokenized.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5TokenizerFast

CLIP_LENGTH = 77  # StableDiffusion3Pipeline pads both CLIP prompts to this length
T5_LENGTH = 512  # the longest `max_sequence_length` the pipeline accepts


def clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Byte-level BPE whose merges make each of `words` (lower-case ASCII) a single token."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(words)
    pieces = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(specials + pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding until every word is one piece.

    Ties are broken alphabetically; the tokenizers library's trainer breaks them at random.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for pieces in split for pair in pairwise(pieces)):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        split = [_merge(pieces, merges[-1]) for pieces in split]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def t5_tokenizer(words: list[str]) -> T5TokenizerFast:
    """Unigram over whole words, also capitalized because T5 keeps case, then printable ASCII characters and `<unk>`."""
    words = sorted({*words, *(word.capitalize() for word in words)})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [("▁" + word, -5.0) for word in words]
    vocab += [(chr(code), -20.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)
