"""What structured output costs a target: masks of a row, whole rounds with and without a grammar, and compilation.

    OMP_NUM_THREADS=2 python -m bench.grammars --save

The model is random and small, with a vocabulary as large as those of today's models; its tokeniser is trained on the
Python files of the environment. A round of a large model takes as long as it takes; what is added to it is the same.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from bench.report import add_report_options, publish, table
from bench.steps import BLOCK_SIZE, MAX_LEN, load
from echelon.pb.inference_pb2 import StructuredOutput
from echelon.pb.reading_pb2 import REASONING_BEGUN, REASONING_UNSPECIFIED, Reasoning
from echelon.pb.sampling_pb2 import Grammar, SeqSampling
from echelon.pb.worker_pb2 import ENGINE_ROLE_TARGET, Round, Row, SeqInit
from gateway.requests.grammar import grammar_of
from workers.engine.engine import Engine
from workers.sampling.grammar import GrammarCompiler

EOS = 0
TRAINING_CHARS = 40_000_000
NUM_SCHEMAS = 200  # that are compiled
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "kind": {"enum": ["person", "company", "animal"]},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "kind", "address"],
    "additionalProperties": False,
}
FORMS: dict[str, tuple[dict[str, Any], Reasoning.ValueType]] = {
    "JSON schema": ({"json_schema": json.dumps(PERSON)}, REASONING_UNSPECIFIED),
    "any JSON object": ({"json_object": True}, REASONING_UNSPECIFIED),
    "reasoning, then the schema": ({"json_schema": json.dumps(PERSON)}, REASONING_BEGUN),
    "regex [a-z ]{5,200}": ({"regex": "[a-z ]{5,200}"}, REASONING_UNSPECIFIED),
}


def train_tokenizer(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _texts() -> Iterator[str]:
    files = sorted(Path(torch.__file__).parents[1].rglob("*.py"))
    random.Random(0).shuffle(files)
    left = TRAINING_CHARS
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        left -= len(text)
        if left < 0:
            return
        yield text


def write_model(folder: Path, vocab_size: int, hidden_size: int, num_layers: int) -> None:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=hidden_size // 128,
        max_position_embeddings=MAX_LEN,
        bos_token_id=EOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    train_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))


def grammar(form: dict[str, Any], reasoning: Reasoning.ValueType) -> Grammar:
    return Grammar(source=grammar_of(StructuredOutput(**form), reasoning), eos_token_ids=[EOS])


def mask_row(compiler: GrammarCompiler, name: str, num_tokens: int) -> list[str]:
    """Walks at random through what a grammar allows, and times the mask of each position."""
    rng, times = random.Random(0), list[float]()
    state = compiler.start(grammar(*FORMS[name]))
    state.bits_behind(())
    for _ in range(num_tokens):
        start = time.perf_counter()
        bits = state.bits_behind(())
        times.append(1e6 * (time.perf_counter() - start))
        choices = np.zeros(0, np.int64)
        if bits is not None:
            choices = np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0]
            choices = choices[choices != EOS]
        if len(choices):
            state.extend([int(choices[rng.randrange(len(choices))])])
        else:
            state.truncate(0)
    return [name, f"{statistics.median(times):.0f}", f"{np.percentile(times, 99):.0f}", f"{max(times):.0f}"]


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = [
        "string",
        "integer",
        "number",
        "boolean",
        "enum",
        "pattern",
        *(["object", "array"] * 2 if depth < 3 else []),
    ]
    match "object" if depth == 0 else rng.choice(kinds):
        case "object":
            names = rng.sample(["id", "name", "title", "items", "count", "state", "owner", "note", "url", "when"], 5)
            properties = {name: random_schema(rng, depth + 1) for name in names}
            return {"type": "object", "properties": properties, "required": names[: rng.randint(0, 5)]}
        case "array":
            return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randint(1, 9)}
        case "enum":
            return {"enum": rng.sample(["new", "open", "done", "lost", "held"], 3)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-z]{2,8}$", r"^\d{4}-\d\d-\d\d$", "^#[0-9a-f]{6}$"])}
        case kind:
            return {"type": kind}


def compile_times(compiler: GrammarCompiler) -> list[float]:
    """ms from a new schema to the first mask of a seq."""
    rng, times = random.Random(1), list[float]()
    for _ in range(NUM_SCHEMAS):
        wanted = grammar({"json_schema": json.dumps(random_schema(rng))}, REASONING_UNSPECIFIED)
        start = time.perf_counter()
        compiler.start(wanted).bits_behind(())
        times.append(1e3 * (time.perf_counter() - start))
    return times


class Seqs:
    """Seqs that decode side by side, with a grammar or without."""

    def __init__(self, engine: Engine, num_seqs: int, wanted: Grammar | None) -> None:
        self._engine = engine
        self._round_id = 0
        blocks = MAX_LEN // BLOCK_SIZE
        self._inits = [
            SeqInit(
                slot=slot,
                token_ids=[(7 * slot + 3 * i) % 4000 + 1 for i in range(64)],
                num_prompt_tokens=64,
                sampling=SeqSampling(temperature=1, top_p=1, repetition_penalty=1, seed=slot, grammar=wanted),
                block_table=range(slot * blocks, (slot + 1) * blocks),
            )
            for slot in range(num_seqs)
        ]
        engine.reset()

    def run(self, num_rounds: int) -> list[float]:
        """ms of each round but the first, which computes the prompt."""
        chunk_len, times = 64, list[float]()
        for _ in range(num_rounds + 1):
            self._round_id += 1
            rows = [Row(slot=seq.slot, chunk_len=chunk_len) for seq in self._inits]
            inits = self._inits if chunk_len > 1 else []
            round_ = Round(round_id=self._round_id, init_seqs=inits, rows=rows)
            start = time.perf_counter()
            self._engine.check(round_)
            self._engine.run(round_)
            times.append(1e3 * (time.perf_counter() - start))
            chunk_len = 1
        return times[1:]


def rounds(engine: Engine, num_seqs: int, num_rounds: int) -> list[list[str]]:
    """Turn by turn, so that both kinds see the same machine."""
    wanted = grammar(*FORMS["JSON schema"])
    plain, masked = list[float](), list[float]()
    for _ in range(4):
        plain += Seqs(engine, num_seqs, None).run(num_rounds)
        masked += Seqs(engine, num_seqs, wanted).run(num_rounds)
    return [[name, *_cells(times)] for name, times in (("without a grammar", plain), ("with a JSON schema", masked))]


def _cells(times: Sequence[float]) -> list[str]:
    return [f"{min(times):.2f}", f"{statistics.median(times):.2f}", f"{np.percentile(times, 99):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seqs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1000, help="positions whose mask is timed")
    parser.add_argument("--threads", type=int, default=2)
    add_report_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, args.vocab, args.hidden, args.layers)
        compiler = GrammarCompiler(folder, args.vocab)
        start = time.perf_counter()
        compiler.start(grammar(*FORMS["any JSON object"])).bits_behind(())
        first_s = time.perf_counter() - start
        masks = [mask_row(compiler, form, args.tokens) for form in FORMS]
        compiled = compile_times(compiler)
        steps = rounds(load(folder, ENGINE_ROLE_TARGET, "bfloat16", args.seqs), args.seqs, args.rounds)
    body = "\n\n".join(
        [
            f"Vocabulary of {args.vocab} tokens. Reading it, for a worker's first grammar: {first_s:.1f} s. From a "
            f"new schema to its first mask, {NUM_SCHEMAS} random schemas: median {statistics.median(compiled):.1f} ms, "
            f"p99 {np.percentile(compiled, 99):.1f} ms, most {max(compiled):.1f} ms.",
            table(["mask of a row", "median us", "p99 us", "most us"], masks),
            f"Decode rounds of a target with {args.layers} layers of {args.hidden} channels, bf16, {args.seqs} seqs, "
            f"{args.threads} threads:",
            table(["round", "least ms", "median ms", "p99 ms"], steps),
        ]
    )
    command = shlex.join(["python", "-m", "bench.grammars", *sys.argv[1:]])
    publish("grammars", body, command=command, save=args.save)


if __name__ == "__main__":
    main()
