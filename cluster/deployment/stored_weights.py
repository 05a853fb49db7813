"""Whether models whose checkpoints are quantised keep these bits, or are dequantised when they are loaded."""

from dataclasses import replace
from typing import Literal

from checkpoint.kept_bits import kept_bits_problem
from cluster.deployment.settings import ModelSettings
from cluster.errors import Problem

StoredWeights = Literal["auto", "stored", "dequantized"]


def why_dequantized(
    model: ModelSettings, device: Literal["cpu", "cuda"], *, compiles: bool, batch_invariant: bool
) -> str | None:
    """Why a model cannot keep the bits of its checkpoint; None if it can. `batch_invariant`: that is required."""
    folder = model.folder
    if device == "cuda" and batch_invariant:
        return "on cuda, batch_invariant has products with dense weights only"
    if device == "cpu" and not compiles:
        return "cpu.compile is off, and torch multiplies by such weights slowly"
    if model.layer_parallel is not None:
        return "its layers are computed in parallel"
    return kept_bits_problem(folder.config, folder.weights, num_ranks=model.tp_size)


def resolve_weights(
    model: ModelSettings,
    wanted: StoredWeights,
    device: Literal["cpu", "cuda"],
    *,
    compiles: bool,
    batch_invariant: bool,
) -> tuple[ModelSettings, Problem | None]:
    """The model with the bits of its checkpoint where they are wanted, and why they cannot be kept where they must."""
    if wanted == "dequantized" or model.folder.quantization is not None:
        return model, None
    reason = why_dequantized(model, device, compiles=compiles, batch_invariant=batch_invariant)
    if reason is None:
        return replace(model, folder=replace(model.folder, keeps_bits=True)), None
    if wanted == "auto":
        return model, None
    remedy = "use auto or dequantized"
    return model, Problem(path=f"{model.role}.weights", value="'stored'", message=f"cannot be: {reason}", remedy=remedy)
