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
import logging
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_models import export, logits_of, new_draft, new_target
from demo_text import Corpus, is_test, load_corpus, pack, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

log = logging.getLogger("train_demo")

TARGET_BATCH_TOKENS = 4096
DRAFT_BATCH_TOKENS = 2048
PEAK_LR = 4e-3
TEACHER_WEIGHT = 0.75  # share of the target's distribution in the draft's labels; the rest is the text itself
EXPORT_EVERY_S = 300.0
LOG_EVERY_STEPS = 20
# Without a final newline, which would split the token of the indentation after it.
SAMPLE_PROMPT = 'class Stack:\n    """A last-in, first-out list."""\n\n    def __init__(self):'

LossFn = Callable[[LlamaForCausalLM, Tensor, Tensor], Tensor]  # (model, inputs [B, T], labels [B, T]) -> scalar


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
