"""How often drafts are accepted, compared with the most that any lossless rule could accept.

Echelon draws draft and target with the same noise and accepts while the tokens are equal (arXiv 2408.07978), so that
the output does not depend on the drafter. Rejection sampling from draft probabilities (maximal coupling) accepts a
token with probability 1 - TV, where TV is the distance of the two distributions. This program prints what the
difference costs, on text that the target writes after each prompt.
"""

import argparse
import copy
import itertools
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.prompts import load_prompts
from bench.report import add_report_options, publish, table
from checkpoint.quantization import WeightFormat, head_format
from kernels.layers.quantized import dequantize_weight, quantize_weight
from kernels.layers.quantized_linear import round_inputs
from kernels.sampling.sample import NoiseKeys, sample

MODELS = Path(__file__).parents[1] / "models"


def maximal_coupling_acceptance(target_logits: Tensor, draft_logits: Tensor, temperature: float) -> Tensor:
    """1 - TV of the two distributions at each position: fp32 [num_rows, vocab_size] x 2 -> [num_rows].

    At temperature 0 each is a single token: 1 where they are the same, else 0.
    """
    if temperature == 0:
        return (target_logits.argmax(dim=1) == draft_logits.argmax(dim=1)).float()
    target = (target_logits / temperature).softmax(dim=1)
    draft = (draft_logits / temperature).softmax(dim=1)
    return torch.minimum(target, draft).sum(dim=1)


def shared_noise_acceptance(
    target_logits: Tensor, draft_logits: Tensor, temperature: float, *, first_position: int, num_seeds: int
) -> Tensor:
    """Share of seeds with which both choose the same token: fp32 [num_rows, vocab_size] x 2 -> fp32 [num_rows]."""
    num_rows = target_logits.shape[0]
    temperatures = torch.full((num_rows,), temperature)
    matches = torch.zeros(num_rows)
    for seed in range(num_seeds):
        keys = NoiseKeys(
            seeds=torch.full((num_rows,), seed),
            sample_indices=torch.zeros(num_rows, dtype=torch.int64),
            positions=torch.arange(first_position, first_position + num_rows),
        )
        target, draft = (sample(logits, temperatures, keys)[1] for logits in (target_logits, draft_logits))
        matches += target == draft
    return matches / num_seeds


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt with the target's continuation, and the target's logits at each position of the continuation."""

    token_ids: list[int]
    num_prompt_tokens: int
    target_logits: Tensor  # fp32 [num_tokens, vocab_size]

    def logits_of(self, model: Any) -> Tensor:
        """Those of another model at the same positions."""
        logits: Tensor = model(torch.tensor([self.token_ids])).logits[0, self.num_prompt_tokens - 1 : -1]
        return logits.float()


def write(target: Any, prompt: list[int], num_tokens: int, *, temperature: float, seed: int) -> Text:
    """Lets the target write `num_tokens` tokens and computes its logits on them."""
    cache, step, written = None, prompt, list(prompt)
    temperatures = torch.tensor([temperature])
    for position in range(len(prompt), len(prompt) + num_tokens):
        output = target(torch.tensor([step]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        keys = NoiseKeys(
            seeds=torch.tensor([seed]), sample_indices=torch.tensor([0]), positions=torch.tensor([position])
        )
        step = sample(output.logits[0, -1:].float(), temperatures, keys)[1].tolist()
        written += step
    logits = target(torch.tensor([written])).logits[0, len(prompt) - 1 : -1].float()
    return Text(written, len(prompt), logits)


def rounded(target: Any, format: WeightFormat, *, with_inputs: bool = False) -> Any:
    """The self-draft in this format: as workers round it at load. with_inputs: and its inputs, as CPUs with VNNI do in
    products of few rows."""
    made = copy.deepcopy(target)
    head = target.get_output_embeddings()
    made.lm_head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)  # a tied one becomes its own
    for name, module in made.named_modules():
        if isinstance(module, torch.nn.Linear):
            rounded_to = head_format(format) if name == "lm_head" else format
            weight = quantize_weight(module.weight.data, rounded_to)
            module.weight.data = dequantize_weight(weight)
            if with_inputs:
                module.register_forward_pre_hook(partial(_round_inputs, weight.group_size))
    return made


def _round_inputs(group_size: int, module: torch.nn.Linear, inputs: tuple[Tensor]) -> Tensor:
    x = inputs[0].flatten(0, -2)
    codes, scales = round_inputs(x, group_size)
    return (codes * scales).flatten(1)[:, : x.shape[1]].view_as(inputs[0])


def first_layers(target: Any, num_layers: int) -> Any:
    made = copy.deepcopy(target)
    made.model.layers = made.model.layers[:num_layers]
    return made


def acceptance(texts: list[Text], draft: Any, temperature: float, num_seeds: int) -> tuple[float, float]:
    """The share accepted with shared noise, and 1 - TV, both averaged over all positions."""
    shared, maximal = [], []
    for text in texts:
        draft_logits = text.logits_of(draft)
        shared.append(
            shared_noise_acceptance(
                text.target_logits,
                draft_logits,
                temperature,
                first_position=text.num_prompt_tokens,
                num_seeds=num_seeds if temperature else 1,
            )
        )
        maximal.append(maximal_coupling_acceptance(text.target_logits, draft_logits, temperature))
    return float(torch.cat(shared).mean()), float(torch.cat(maximal).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--draft", type=Path, default=MODELS / "demo-draft")
    parser.add_argument(
        "--self-drafts", nargs="*", choices=get_args(WeightFormat), default=[], help="also of the target"
    )
    parser.add_argument("--rounded-inputs", action="store_true", help="also self-drafts that round their inputs")
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="also the target's first layers, so many")
    parser.add_argument("--dataset", type=Path, help="JSON lines with 'prompt'; default: a few bundled ones")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128, help="tokens written after each prompt")
    parser.add_argument("--seeds", type=int, default=16, help="draws at each position")
    add_report_options(parser)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.target)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (options.target, options.draft)
    )
    drafts = {options.draft.name: draft}
    drafts |= {f"the target in {format}": rounded(target, format) for format in options.self_drafts}
    if options.rounded_inputs:
        drafts |= {
            f"the target in {format}, inputs too": rounded(target, format, with_inputs=True)
            for format in options.self_drafts
        }
    drafts |= {f"its first {num} layers": first_layers(target, num) for num in options.layers}
    prompts = [tokenizer(prompt)["input_ids"] for prompt in load_prompts(options.dataset, options.prompts)]
    lines = []
    with torch.inference_mode():
        for text_temperature in (0.0, 1.0):
            texts = [
                write(target, prompt, options.tokens, temperature=text_temperature, seed=index)
                for index, prompt in enumerate(prompts)
            ]
            for temperature, (name, made) in itertools.product((0.0, 1.0), drafts.items()):
                shared, maximal = acceptance(texts, made, temperature, options.seeds)
                lines.append([name, f"{text_temperature:g}", f"{temperature:g}", f"{shared:.3f}", f"{maximal:.3f}"])
    header = [
        "draft",
        "temperature of the text",
        "temperature of the draws",
        "accepted (shared noise)",
        "maximal coupling (1 - TV)",
    ]
    command = shlex.join(["python", "-m", "bench.acceptance", *sys.argv[1:]])
    publish("acceptance", table(header, lines), command=command, save=options.save)


if __name__ == "__main__":
    main()
