"""Trains and measures the bundled demo pair: a small target and a smaller draft that complete Python source.

    python models/train_demo.py                      # train both on this interpreter's standard library
    python models/train_demo.py --source DIR ...     # more text, e.g. other interpreters' libraries
    python models/train_demo.py --draft-only         # keep the target, train only the draft
    python models/train_demo.py --evaluate           # recompute the model card's numbers

The learning rate follows the clock (`--target-minutes`, `--draft-minutes`), not a number of steps: training ends
on time and fully decayed, however fast or busy the machine is. Both results are plain Hugging Face folders.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

log = logging.getLogger("train_demo")

END_OF_TEXT = "<|endoftext|>"  # precedes every file, so it is both bos and eos
END_OF_TEXT_ID = 0
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
TARGET_BATCH_TOKENS = 4096
DRAFT_BATCH_TOKENS = 2048
PEAK_LR = 4e-3
TEACHER_WEIGHT = 0.75  # share of the target's distribution in the draft's labels; the rest is the text itself
EXPORT_EVERY_S = 300.0
LOG_EVERY_STEPS = 20
HELD_OUT_SHARE = 0.04
MAX_FILE_CHARS = 200_000  # the library's longer files are generated tables and prose
EXCLUDED_PARTS = frozenset({"site-packages", "__pycache__", "encodings", "pydoc_data"})  # not the library, or tables
TEST_PARTS = frozenset({"test", "tests", "idle_test"})
# A code completer's chat is the messages' text, one after another.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
# Without a final newline, which would split the token of the indentation behind it.
SAMPLE_PROMPT = 'class Stack:\n    """A last-in, first-out list."""\n\n    def __init__(self):'

LossFn = Callable[[LlamaForCausalLM, Tensor, Tensor], Tensor]  # (model, inputs [B, T], labels [B, T]) -> scalar


# ---------------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True, slots=True)
class Corpus:
    """Source text by relative path, split by file."""

    train: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)


def python_files(root: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of each library file under `root`, in the order of the paths."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        # _sysconfigdata names the folders of the machine that built the interpreter.
        if EXCLUDED_PARTS.intersection(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read(MAX_FILE_CHARS + 1)
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library's tests hold files that are broken on purpose
        if 0 < len(text) <= MAX_FILE_CHARS:
            yield relative.as_posix(), text


def deduplicate(files: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Keeps the first file of each path and of each content: a later source only adds what is new."""
    kept: dict[str, str] = {}
    seen: set[bytes] = set()
    for path, text in files:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if path not in kept and digest not in seen:
            kept[path] = text
            seen.add(digest)
    return kept


def is_held_out(path: str) -> bool:
    """Goes by the file's name alone: versions of Python move files between folders, and the copies must not leak."""
    parts = PurePosixPath(path).parts
    name = "/".join(parts[-2:]) if parts[-1].startswith("__") else parts[-1]  # every package has an __init__.py
    fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return fraction < HELD_OUT_SHARE


def is_test(path: str) -> bool:
    return bool(TEST_PARTS.intersection(PurePosixPath(path).parts))


def load_corpus(sources: list[Path]) -> Corpus:
    """Trains on all sources; measures on the first one's held-out files."""
    corpus = Corpus()
    first_paths = {path for path, _ in python_files(sources[0])}
    for path, text in deduplicate(file for root in sources for file in python_files(root)).items():
        if not is_held_out(path):
            corpus.train[path] = text
        elif path in first_paths:
            corpus.held_out[path] = text
    return corpus


# ------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE; encoding puts the end-of-text token in front, where every training file has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that every text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def pack(texts: Iterable[str], tokenizer: Tokenizer) -> Tensor:  # [num_tokens]
    """All files in one stream, each behind its end-of-text token."""
    encodings = tokenizer.encode_batch(list(texts))
    return torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.long)


# ---------------------------------------------------------------------------------------------------- models


def llama(*, hidden_size: int, intermediate_size: int, num_heads: int) -> LlamaForCausalLM:
    """Eight layers (layer-parallel drafting needs some); sizes that tensor parallelism 1, 2 and 4 split evenly."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=8,
        num_attention_heads=num_heads,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    return LlamaForCausalLM(config)


def new_target() -> LlamaForCausalLM:
    return llama(hidden_size=256, intermediate_size=768, num_heads=8)


def new_draft() -> LlamaForCausalLM:
    return llama(hidden_size=128, intermediate_size=384, num_heads=4)


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:  # [B, T] -> [B * T, VOCAB_SIZE], fp32
    return model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a bf16 copy; the model itself stays in fp32."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID, eos_token_id=END_OF_TEXT_ID, pad_token_id=END_OF_TEXT_ID, do_sample=False
    )
    half.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    log.info("wrote %s", folder)


# -------------------------------------------------------------------------------------------------- training


def text_loss(model: LlamaForCausalLM, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(model, inputs), labels.flatten())


def distillation_loss(teacher: LlamaForCausalLM) -> LossFn:
    """Cross entropy against a mix of the teacher's distribution and the text."""

    def loss(model: LlamaForCausalLM, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            taught = logits_of(teacher, inputs).softmax(-1)
        log_probs = logits_of(model, inputs).log_softmax(-1)
        imitation = -(taught * log_probs).sum(-1).mean()
        return TEACHER_WEIGHT * imitation + (1 - TEACHER_WEIGHT) * F.nll_loss(log_probs, labels.flatten())

    return loss


def lr_scale(progress: float) -> float:
    """Warms up over the first 2 %, holds, then falls linearly to zero over the last 60 %."""
    return min(1.0, progress / 0.02, (1.0 - progress) / 0.6)


def sequence_length(progress: float) -> int:
    """Short sequences are cheaper; the late, longer ones teach the positions beyond them."""
    if progress < 0.7:
        return 256
    return 512 if progress < 0.9 else 1024


class Batches:
    """Draws batches of `batch_tokens` labels from one token stream, without repeats within an epoch."""

    def __init__(self, ids: Tensor, batch_tokens: int, seed: int = 0) -> None:
        self._ids = ids
        self._batch_tokens = batch_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._windows: dict[int, Iterator[Tensor]] = {}  # by length

    def draw(self, length: int) -> Tensor:  # [batch_tokens / length, length + 1]
        if length not in self._windows:
            self._windows[length] = self._endless_windows(length)
        return torch.stack([next(self._windows[length]) for _ in range(self._batch_tokens // length)])

    def _endless_windows(self, length: int) -> Iterator[Tensor]:  # each [length + 1]
        """Each epoch cuts the stream at another offset and visits the pieces in random order."""
        if len(self._ids) < 2 * length:
            raise ValueError(f"{len(self._ids)} tokens are too few for windows of {length}: add a --source")
        while True:
            offset = int(torch.randint(length, (), generator=self._generator))
            num_windows = (len(self._ids) - 1 - offset) // length
            for index in torch.randperm(num_windows, generator=self._generator).tolist():
                start = offset + index * length
                yield self._ids[start : start + length + 1]


class Optimizer:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; one learning rate fits both."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]

    def step(self, lr: float) -> None:
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad()


class Meter:
    """Logs the mean loss and the speed every LOG_EVERY_STEPS steps."""

    def __init__(self, minutes: float, batch_tokens: int) -> None:
        self.num_steps = 0
        self._minutes = minutes
        self._batch_tokens = batch_tokens
        self._losses: list[float] = []
        self._start_s = self._logged_s = time.monotonic()

    def progress(self) -> float:
        return (time.monotonic() - self._start_s) / (60 * self._minutes)

    def add(self, loss: float) -> None:
        self.num_steps += 1
        self._losses.append(loss)
        if len(self._losses) == LOG_EVERY_STEPS:
            self._log(time.monotonic())

    def _log(self, now_s: float) -> None:
        mean_loss = sum(self._losses) / len(self._losses)
        rate = len(self._losses) * self._batch_tokens / (now_s - self._logged_s)
        left_min = self._minutes * (1 - self.progress())
        log.info("step %d  loss %.3f  %.0f tokens/s  %.1f min left", self.num_steps, mean_loss, rate, left_min)
        self._losses.clear()
        self._logged_s = now_s


def train(
    model: LlamaForCausalLM,
    ids: Tensor,
    loss_fn: LossFn,
    *,
    batch_tokens: int,
    minutes: float,
    save: Callable[[], None],
) -> None:
    """Trains in place until the time is over; saves now and then, so that an early stop leaves a usable model."""
    batches, optimizer, meter = Batches(ids, batch_tokens), Optimizer(model), Meter(minutes, batch_tokens)
    saved_s = time.monotonic()
    while (progress := meter.progress()) < 1.0:
        batch = batches.draw(sequence_length(progress))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_fn(model, batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step(PEAK_LR * lr_scale(progress))
        meter.add(loss.item())
        if time.monotonic() - saved_s > EXPORT_EVERY_S:
            save()
            saved_s = time.monotonic()
    save()
    log.info("trained %d steps, %d tokens", meter.num_steps, meter.num_steps * batch_tokens)


def train_target(ids: Tensor, tokenizer: Tokenizer, folder: Path, minutes: float) -> None:
    target = new_target()

    def save() -> None:
        export(target, tokenizer, folder)

    train(target, ids, text_loss, batch_tokens=TARGET_BATCH_TOKENS, minutes=minutes, save=save)


@torch.no_grad()
def inherit_embedding(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    """Keeps the main directions of the target's embedding: which tokens are alike need not be learned again."""
    wide = target.get_input_embeddings().weight.float()
    narrow = draft.get_input_embeddings().weight
    _, _, directions = torch.linalg.svd(wide, full_matrices=False)
    narrow.copy_(wide @ directions[: narrow.shape[1]].T)


def train_draft(ids: Tensor, tokenizer: Tokenizer, folder: Path, minutes: float, *, target_folder: Path) -> None:
    target = LlamaForCausalLM.from_pretrained(target_folder, dtype=torch.bfloat16).eval()
    draft = new_draft()
    inherit_embedding(draft, target)

    def save() -> None:
        export(draft, tokenizer, folder)

    train(draft, ids, distillation_loss(target), batch_tokens=DRAFT_BATCH_TOKENS, minutes=minutes, save=save)


# ------------------------------------------------------------------------------------------------ evaluation


@torch.inference_mode()
def token_losses(model: LlamaForCausalLM, ids: Tensor, *, length: int = 512) -> Tensor:  # [num_windows, length]
    """Nats of each held-out token, in windows that start cold."""
    num_windows = (len(ids) - 1) // length
    inputs = ids[: num_windows * length].view(num_windows, length)
    labels = ids[1 : num_windows * length + 1].view(num_windows, length)
    losses = [
        F.cross_entropy(logits_of(model, x), y.flatten(), reduction="none").view_as(y)
        for x, y in zip(inputs.split(8), labels.split(8), strict=True)
    ]
    return torch.cat(losses)


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompts: Tensor, num_tokens: int) -> Tensor:  # [B, T] -> [B, T + num_tokens]
    """Never ends early, so that all rows have the same length."""
    mask = torch.ones_like(prompts)
    return model.generate(prompts, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens)


def sampled(model: LlamaForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    """The prompt and its continuation at temperature 0.7; always the same one."""
    torch.manual_seed(0)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=True, temperature=0.7)
    return text[0].tolist()


@torch.inference_mode()
def top1_agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, text: Tensor, num_last: int) -> float:
    """How often both models rank the same token first, over the last `num_last` tokens of each row."""
    target_top, draft_top = (
        model(input_ids=text[:, :-1]).logits[:, -num_last:].argmax(-1) for model in (target, draft)
    )
    return (target_top == draft_top).float().mean().item()


def spread_prompts(ids: Tensor, *, length: int, num_prompts: int = 64) -> Tensor:  # [num_prompts, length]
    starts = torch.linspace(0, len(ids) - length, num_prompts).long()
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def log_losses(name: str, model: LlamaForCausalLM, ids: Tensor) -> None:
    losses = token_losses(model, ids)
    mean, late = losses.mean().item(), losses[:, 256:].mean().item()
    log.info("%s: %.3f nats a token, %.3f at positions 256 to 511", name, mean, late)


def evaluate(corpus: Corpus, target_folder: Path, draft_folder: Path) -> None:
    """Logs what the model card states."""
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    target = LlamaForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    draft = LlamaForCausalLM.from_pretrained(draft_folder, dtype=torch.float32).eval()
    for part, of_tests in (("library", False), ("its tests", True)):
        files = [text for path, text in corpus.held_out.items() if is_test(path) is of_tests]
        if not files:
            continue  # some systems package the tests separately
        ids = pack(files, tokenizer)
        chars_per_token = sum(map(len, files)) / len(ids)
        log.info("%s: %d files, %d tokens, %.2f characters a token", part, len(files), len(ids), chars_per_token)
        log_losses("  target", target, ids)
        log_losses("  draft", draft, ids)
        prompts, text = spread_prompts(ids, length=128), spread_prompts(ids, length=192)
        greedy_share = top1_agreement(target, draft, greedy(target, prompts, 64), 64)
        text_share = top1_agreement(target, draft, text, 64)
        log.info("  top-1 agreement: %.3f on greedy continuations, %.3f on the files' text", greedy_share, text_share)
    log.info("sample:\n%s", tokenizer.decode(sampled(target, tokenizer.encode(SAMPLE_PROMPT).ids, 128)))
    log.info("held-out files:\n%s", "\n".join(sorted(corpus.held_out)))


# ------------------------------------------------------------------------------------------------------- main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the two folders lie")
    parser.add_argument("--source", type=Path, nargs="*", default=[], help="more library folders to train on")
    parser.add_argument("--target-minutes", type=float, default=33.0, help="time for the target (default 33)")
    parser.add_argument("--draft-minutes", type=float, default=16.0, help="time for the draft (default 16)")
    parser.add_argument("--draft-only", action="store_true", help="keep the target and its tokenizer")
    parser.add_argument("--evaluate", action="store_true", help="train nothing; measure the pair in --out")
    return parser.parse_args()


def train_pair(corpus: Corpus, args: argparse.Namespace, target_folder: Path, draft_folder: Path) -> None:
    torch.manual_seed(0)
    if args.draft_only:
        tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(corpus.train.values())
    ids = pack(corpus.train.values(), tokenizer)
    log.info("%d training files, %d tokens; %d files held out", len(corpus.train), len(ids), len(corpus.held_out))
    if not args.draft_only:
        train_target(ids, tokenizer, target_folder, args.target_minutes)
    train_draft(ids, tokenizer, draft_folder, args.draft_minutes, target_folder=target_folder)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse_args()
    corpus = load_corpus([Path(sysconfig.get_paths()["stdlib"]), *args.source])
    target_folder, draft_folder = args.out / "demo-target", args.out / "demo-draft"
    if args.evaluate:
        evaluate(corpus, target_folder, draft_folder)
    else:
        train_pair(corpus, args, target_folder, draft_folder)


if __name__ == "__main__":
    main()
