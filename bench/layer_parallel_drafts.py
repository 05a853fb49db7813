"""What layer-parallel drafting costs and gains (arXiv 2502.02493).

Acceptance: the draft writes k tokens at a time after a text that the target has written greedily, and continues after
those that were right. The draft's arithmetic is that of a worker. Dividing its layers over ranks changes no bit, so one
process is enough.

--step-times: how long a draft step of real workers takes on one and two ranks, a core each, for a draft of random
weights (bench/layer_parallel_steps.py).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.layer_parallel_steps import add_step_options, measure_steps
from bench.prompts import load_prompts
from bench.report import add_report_options, publish, table
from checkpoint.config_json import load_model_config
from checkpoint.layer_parallel import LayerGroups
from checkpoint.tokenizer import load_tokenizer
from echelon.pb.sampling_pb2 import SeqSampling
from echelon.pb.worker_pb2 import SeqInit
from workers.collectives import SoloGroup
from workers.engine.kv_cache import KVLayout
from workers.engine.seq_state import Limits, SeqTable
from workers.models.layer_groups import LayerParallelPlan, MLPs, Weights, choose_groups, one_by_one
from workers.models.layer_parallel_decoder import LayerParallelLM
from workers.models.layer_similarity import layer_input_similarity
from workers.models.loading import load_layer_parallel_model
from workers.process.draft_layout import LEAST_SIMILARITY

ROOT = Path(__file__).parents[1]
PLOT = ROOT / "docs" / "images" / "layer-parallel-acceptance.png"
CPU = torch.device("cpu")
DTYPE = torch.float32
MAX_MODEL_LEN = 1024
BLOCK_SIZE = 16
SIZES = (1, 2, 3, 4)  # of groups
ALONE = "alone"  # first and last layer
GROUPED = "in groups"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to draft."""

    name: str
    groups: LayerGroups
    calibrated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """`a_token`: the share of right drafts among those compared. A round counts up to its first wrong draft."""

    a_token: float
    a_round: float


class Writer:
    """A model and some seqs, each with its own progress. Tokens are chosen greedily."""

    def __init__(self, folder: Path, groups: LayerGroups | None, texts: Sequence[Sequence[int]]) -> None:
        config = load_model_config(folder)
        plan = LayerParallelPlan(
            groups=groups or one_by_one(config.num_layers),
            lp_size=max(map(len, groups)) if groups else 1,
            num_ranks=1,
            weights=Weights.REPLICATED,
            mlps=MLPs.REPLICATED,
        )
        self._model: LayerParallelLM = load_layer_parallel_model(
            folder, plan, dtype=DTYPE, device=CPU, group=SoloGroup(), max_model_len=MAX_MODEL_LEN
        )
        limits = Limits(
            num_slots=len(texts),
            max_model_len=MAX_MODEL_LEN,
            vocab_size=config.vocab_size,
            block_size=BLOCK_SIZE,
            num_blocks=len(texts) * MAX_MODEL_LEN // BLOCK_SIZE,
        )
        layout = KVLayout(
            num_layers=config.num_layers,
            block_size=BLOCK_SIZE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=DTYPE,
        )
        self._kv_caches = layout.allocate(limits.num_blocks, CPU)
        self._table = SeqTable(limits)
        for slot, token_ids in enumerate(texts):
            self._table.init(
                SeqInit(
                    slot=slot,
                    token_ids=token_ids,
                    num_prompt_tokens=len(token_ids),
                    block_table=range(slot * limits.max_blocks, (slot + 1) * limits.max_blocks),
                    sampling=SeqSampling(top_p=1.0, repetition_penalty=1.0),
                )
            )

    def write(self, slots: Sequence[int], *, exact: bool) -> list[int]:
        """Computes the tokens without KV, appends a token to each of `slots`, and returns the new tokens."""
        lengths, computed = self._table.lengths, self._table.num_computed
        counts = [int(lengths[slot] - computed[slot]) for slot in slots]
        batch = self._table.pack(slots, counts)
        with torch.inference_mode():
            forward = self._model.forward if exact else self._model.draft_forward
            hidden = forward(batch, self._kv_caches)[batch.cu_seqlens_q[1:].long() - 1]
            token_ids: list[int] = self._model.compute_logits(hidden).argmax(dim=1).tolist()
        computed[list(slots)] = lengths[list(slots)]
        self._table.append(slots, [[token_id] for token_id in token_ids])
        return token_ids

    def give(self, slot: int, length: int, token_ids: Sequence[int], *, num_kept: int) -> None:
        """Cuts the seq to its first `length` tokens and appends these. The first `num_kept` tokens keep their KV."""
        self._table.crop(slot, length)
        self._table.num_computed[slot] = min(int(self._table.num_computed[slot]), num_kept)
        self._table.append([slot], [token_ids])


def target_texts(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Each prompt with the continuation that the target writes."""
    writer = Writer(folder, None, prompts)
    texts = [list(prompt) for prompt in prompts]
    for _ in range(num_tokens):
        for text, token_id in zip(texts, writer.write(range(len(prompts)), exact=True), strict=True):
            text.append(token_id)
    return texts


def acceptance(
    folder: Path, way: Way, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], k: int
) -> Acceptance:
    """Runs rounds of k drafts after each text, until none has room for another round.

    With calibration, a round begins with an exact pass over all new tokens, whose logits give the first draft. Without
    it, nothing after the prompt is computed exactly, and right drafts keep their KV.
    """
    writer = Writer(folder, way.groups, prompts)
    lengths = [len(prompt) for prompt in prompts]
    num_rounds = num_reached = num_right = 0
    exact = True  # the prompts
    while slots := [slot for slot, text in enumerate(texts) if lengths[slot] + k < len(text)]:
        drafts = list(zip(*_chain(writer, slots, k, exact), strict=True))  # of each slot
        for slot, chain in zip(slots, drafts, strict=True):
            length, text = lengths[slot], texts[slot]
            right = next((i for i, token_id in enumerate(chain) if token_id != text[length + i]), k)
            num_rounds, num_right, num_reached = num_rounds + 1, num_right + right, num_reached + min(right + 1, k)
            lengths[slot] = length + right + 1
            kept = length if way.calibrated else length + right
            writer.give(slot, length + right, [text[length + right]], num_kept=kept)
        exact = way.calibrated
    return Acceptance(a_token=num_right / num_reached, a_round=num_right / num_rounds)


def _chain(writer: Writer, slots: Sequence[int], k: int, exact: bool) -> Iterator[list[int]]:
    """The i-th draft of each slot, for i below k."""
    for step in range(k):
        yield writer.write(slots, exact=exact and step == 0)


def ways(folder: Path) -> list[Way]:
    num_layers = load_model_config(folder).num_layers
    found = [Way(name="", groups=one_by_one(num_layers), calibrated=True)]
    for calibrated in (True, False):
        for size in SIZES[1:]:
            inner = _every(range(1, num_layers - 1), size)
            found.append(Way(name=ALONE, groups=((0,), *inner, (num_layers - 1,)), calibrated=calibrated))
            found.append(Way(name=GROUPED, groups=_every(range(num_layers), size), calibrated=calibrated))
    similarity = layer_input_similarity(
        folder, dtype=DTYPE, device=CPU, max_model_len=MAX_MODEL_LEN, progress=lambda done, total: None
    )
    auto = choose_groups(similarity, lp_size=SIZES[-1], least_similarity=LEAST_SIMILARITY)
    return [*found, Way(name="alone (chosen: auto)", groups=auto, calibrated=True)]


def _every(layers: range, size: int) -> LayerGroups:
    return tuple(tuple(layers[start : start + size]) for start in range(0, len(layers), size))


def plot(results: Sequence[tuple[Way, Acceptance]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), dpi=120)
    sequential = results[0][1].a_token
    axes.axhline(sequential, color="0.6", linestyle=":", label="sequential")
    for name, marker in ((ALONE, "o"), (GROUPED, "s")):
        for calibrated, style in ((True, "-"), (False, "--")):
            points = [
                (max(map(len, way.groups)), result.a_token)
                for way, result in results
                if way.calibrated is calibrated and way.name == name
            ]
            label = f"first and last layer {name}, {'calibrated' if calibrated else 'not calibrated'}"
            axes.plot(*zip((1, sequential), *points, strict=True), style, marker=marker, label=label)
    axes.set_xticks(SIZES)
    axes.set_xlabel("layers that attend at once")
    axes.set_ylabel("acceptance of a draft token")
    axes.set_ylim(0.5, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def measure_acceptance(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.target)
    prompts = [tokenizer.encode(prompt).ids for prompt in load_prompts(options.dataset, options.prompts)]
    prompts = [prompt for prompt in prompts if len(prompt) + options.tokens <= MAX_MODEL_LEN]
    texts = target_texts(options.target, prompts, options.tokens)
    results = [(way, acceptance(options.draft, way, prompts, texts, options.k)) for way in ways(options.draft)]
    rows = [
        [
            str(max(map(len, way.groups))),
            " ".join(str(list(group)).replace(" ", "") for group in way.groups),
            way.name,
            "yes" if way.calibrated else "no",
            f"{result.a_token:.3f}",
            f"{result.a_token / results[0][1].a_token - 1:+.1%}",
            f"{result.a_round:.2f}",
        ]
        for way, result in results
    ]
    header = [
        "N",
        "groups",
        "first and last layer",
        "calibrated",
        "acceptance per token",
        "against sequential",
        f"accepted per round (k = {options.k})",
    ]
    dataset = f" --dataset {options.dataset.name}" if options.dataset else ""
    command = f"python -m bench.layer_parallel_drafts{dataset} --prompts {options.prompts} --tokens {options.tokens}"
    publish("layer-parallel-acceptance", table(header, rows), command=command, save=options.save)
    if options.save:
        plot(results, PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=ROOT / "models" / "demo-target")
    parser.add_argument("--draft", type=Path, default=ROOT / "models" / "demo-draft")
    parser.add_argument("--dataset", type=Path, help="JSON lines with 'prompt'; default: a few bundled ones")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="tokens written after each prompt")
    parser.add_argument("--k", type=int, default=4, help="drafts a round")
    parser.add_argument("--step-times", action="store_true", help="measure steps instead of acceptance")
    add_step_options(parser)
    add_report_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step_times:
        measure_steps(options)
    else:
        measure_acceptance(options)


if __name__ == "__main__":
    main()
