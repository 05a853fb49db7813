"""A small tokeniser for each pipeline that models use, each with added tokens of every kind."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "na\u00efve caf\u00e9, \u6771\u4eac\u3067 \U0001f642\U0001f643 \u2014 ok?",
    "def f(x):\n    return x  # \u00fcn\u00efc\u00f6d\u00e9 \u00bd \u20ac",
    "\U0001f1e9\U0001f1ea \U0001f469\u200d\U0001f469\u200d\U0001f467 flags and families",
]
SPACE = "\u2581"  # as SentencePiece writes it
WORDS = [SPACE, f"{SPACE}Hello", f"{SPACE}wor", "ld", "\u00e9", "\u6771", SPACE * 3, "a", "b", f"{SPACE}a", f"{SPACE}b"]
MERGES = [(SPACE, "a"), (SPACE, "b")]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ADDED = [
    AddedToken("<tool call>", normalized=False),
    AddedToken("<tool>", normalized=True),
    AddedToken("<left>", lstrip=True, normalized=False),
    AddedToken("<right>", rstrip=True, normalized=True),
    AddedToken("<|start|>", special=True, normalized=False),
]


def byte_level() -> Tokenizer:
    """Llama 3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return finished(tokenizer)


def sentencepiece() -> Tokenizer:
    """Llama 2, Mistral: words with a visible space, and bytes for text without a token."""
    pieces = ["<s>", "</s>", *BYTES, *WORDS]
    tokenizer = Tokenizer(models.BPE(vocab=numbered(pieces), merges=MERGES, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(tokenizer)


def metaspace() -> Tokenizer:
    """The same, as later versions save it."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return Tokenizer.from_str(tokenizer.to_str())


def unigram() -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *WORDS, *BYTES]
    scores = [(piece, -float(index % 7)) for index, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocab=scores, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return finished(tokenizer)


def word_piece() -> Tokenizer:
    pieces = [
        "[UNK]",
        "<s>",
        "</s>",
        *"abcdefgh.,?!'",
        "hello",
        "do",
        "not",
        "n't",
        *(f"##{char}" for char in "abcdefgh"),
    ]
    tokenizer = Tokenizer(models.WordPiece(vocab=numbered(pieces), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return finished(tokenizer)


KINDS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "unigram": unigram,
    "word_piece": word_piece,
}


def numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate(pieces)}


def finished(tokenizer: Tokenizer) -> Tokenizer:
    """Adds the added tokens, and BOS in front of a text."""
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(ADDED)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer
