"""Drafts that are made at load: which weights they have, that those never exist twice, and what is said of them."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.folder import read_model_folder
from checkpoint.quantization import Quantization, WeightFormat
from childproc.spec import SpecError
from cluster.deployment.deployment_file import load_deployment
from cluster.errors import ConfigError
from cluster.local import local_settings
from cluster.planning.plan import Inventory, Node
from cluster.planning.planner import make_plan
from cluster.planning.ranks import ranks_of
from cluster.processes.shown_settings import shown_settings
from cluster.processes.specs import worker_specs
from echelon.pb.process_pb2 import WorkerSpec
from echelon.pb.worker_pb2 import ENGINE_ROLE_DRAFT, ENGINE_ROLE_TARGET, EngineInfo, EngineRole
from kernels.layers.quantized import dequantize_weight, quantize_weight
from kernels.native.linear import why_not
from kernels.native.quantized import NativeQuantizedWeight, can_round_inputs
from tests.helpers.deployment_streams import DRAFT, TARGET
from tests.helpers.engines import drive, engine_spec
from tests.helpers.rounds import greedy
from workers.collectives import SoloGroup
from workers.engine.engine import Engine
from workers.layers.context import BuildContext, WeightSlice
from workers.layers.linear import MergedColumnParallelLinear
from workers.models.decoder import CausalLM
from workers.models.loading import load_model
from workers.process.cohort import Cohort
from workers.process.load import load_engines
from workers.process.tier_setup import kv_facts

FORMATS: list[WeightFormat] = ["int8", "int4", "mxfp4"]


def load(**options: Any) -> CausalLM:
    return load_model(
        TARGET, dtype=torch.float32, device=torch.device("cpu"), group=SoloGroup(), max_model_len=64, **options
    )


@pytest.mark.parametrize("format", FORMATS)
def test_matrices_are_the_rounded_ones_of_the_checkpoint(format: WeightFormat) -> None:
    whole, made = load(), load(quantization=format)
    x = torch.randn(17, whole.config.hidden_size)  # of fewer rows, the inputs may be rounded too
    for ours, theirs, rounded_to in (
        (made.layers[2].mlp.gate_up_proj, whole.layers[2].mlp.gate_up_proj, format),
        (made.layers[7].attention.qkv_proj, whole.layers[7].attention.qkv_proj, format),
        (made.head, whole.head, Quantization(format=format, device="cpu").head_format),
    ):
        dense = theirs(torch.eye(whole.config.hidden_size)).T.contiguous()
        expected = x @ dequantize_weight(quantize_weight(dense, rounded_to)).T
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    tokens = torch.arange(5)
    assert torch.equal(made.embedding(tokens), whole.embedding(tokens))
    assert torch.equal(made.norm, whole.norm)


@pytest.mark.parametrize("format", FORMATS)
def test_few_rows_of_a_draft_round_their_inputs_where_that_is_fast(format: WeightFormat) -> None:
    layer = load(quantization=format).layers[2].mlp.down_proj
    assert isinstance(layer.weight, NativeQuantizedWeight) == (why_not() is None)
    if isinstance(layer.weight, NativeQuantizedWeight):
        assert layer.weight.rounds_inputs == can_round_inputs()


def test_only_one_matrix_exists_in_full_while_they_are_rounded() -> None:
    ctx = BuildContext(
        SoloGroup(), dtype=torch.bfloat16, device=torch.device("cpu"), batch_invariant=False, quantization="int4"
    )
    layers = [MergedColumnParallelLinear([f"{i}.gate", f"{i}.up"], 64, 128, bias=True, ctx=ctx) for i in range(4)]
    seen: list[weakref.ref[torch.Tensor]] = []

    def read(slices: Sequence[WeightSlice]) -> None:
        for part in slices:
            part.target.fill_(1.0)
        matrices = {id(part.parameter): part.parameter for part in slices if part.parameter.ndim == 2}
        assert len(matrices) <= 1
        assert all(earlier() is None for earlier in seen), "an earlier matrix is still there"
        seen.extend(weakref.ref(matrix) for matrix in matrices.values())

    ctx.fill(read)
    assert len(seen) == len(layers)
    y = layers[3](torch.ones(1, 64, dtype=torch.bfloat16))
    torch.testing.assert_close(y, torch.full((1, 256), 65.0).bfloat16(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("num_layers", [0, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_the_plan_knows_their_bytes(format: WeightFormat, num_layers: int) -> None:
    quantization = Quantization(format=format, device="cpu")
    folder = read_model_folder(TARGET, dtype="float32").first_layers(num_layers).rounded(quantization)
    assert folder.weight_bytes(1) == load(quantization=format, num_layers=num_layers).weight_bytes


@pytest.mark.skipif(why_not() is not None, reason="nothing is packed on this machine")
def test_the_plan_knows_that_packing_copies_a_tied_head() -> None:
    model = load()
    (rank,) = ranks_of(local_settings(TARGET, dtype="float32"), 0)
    products = [model.head, *(layer.attention.qkv_proj for layer in model.layers)]
    products += [layer.attention.o_proj for layer in model.layers]
    products += [product for layer in model.layers for product in (layer.mlp.gate_up_proj, layer.mlp.down_proj)]
    packed = [product.weight.packed for product in products]
    held = model.embedding.weight.nbytes + sum(weight.nbytes for weight in packed)
    assert rank.memory.weight_bytes == model.weight_bytes == pytest.approx(held, rel=0.01)


def test_the_first_layers_alone_are_a_model() -> None:
    made = load(num_layers=3)
    assert len(made.layers) == 3
    assert torch.equal(made.norm, load().norm)


def settings_of(folder: Path, draft: str, rest: str = "device: cpu") -> Any:
    file = folder / "deployment.yaml"
    file.write_text(
        f"apiVersion: echelon/v1\nkind: Deployment\nname: demo\ntarget: {{model: {TARGET}}}\n"
        f"draft: {{{draft}}}\n{rest}\n"
    )
    return load_deployment(file)


REFUSED = {
    "model: self": "draft.model: 'self': would be the target again",
    "model: self, quantization: int3": "draft.quantization: 'int3': must be 'int8', 'int4' or 'mxfp4'",
    "model: self, quantization: int4, kv_dtype: int8": "draft.kv_dtype: 'int8': must be 'auto' or 'fp8'",
    "model: self, quantization: int4, kv_dtype: fp8, layer_parallel_size: 2": (
        "draft.kv_dtype: 'fp8': is not there for a layer-parallel draft; leave one of them out"
    ),
    "model: self, quantization: int4, draft: {method: suffix, model: x}": "draft.draft: needs one of method and model",
    "model: self, quantization: int4, draft: {}": "set method: suffix, or the folder of a small model",
    "model: self, quantization: int4, draft: {model: nowhere}": "draft.draft.model: 'nowhere': there is no such folder",
    f"model: self, quantization: int4, draft: {{model: {DRAFT}}}, layer_parallel_size: 2": (
        "cannot be beneath a layer-parallel draft; use method: suffix, or layer_parallel_size: 1"
    ),
    "model: self, quantization: int4, draft: {method: lookup}": "draft.draft.method: 'lookup': must be 'suffix'",
    "model: self, layers: 9": "draft.layers: 9: 9 layers are more than the model's 8; use fewer, or all",
    "model: self, layers: some": "draft.layers: 'some': must be all or an integer from 1 to 4096",
    "model: self, quantization: int4, layer_groups: [[0], [1, 2], [3]], layer_parallel_size: 2, layers: 5": (
        "draft.layer_groups: names 4 layers, the draft has 5"
    ),
}


@pytest.mark.parametrize("draft", REFUSED)
def test_what_cannot_be_made_is_refused_by_name(draft: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        settings_of(tmp_path, draft)
    assert REFUSED[draft] in str(error.value).replace("\n", " ")


@pytest.mark.parametrize("format", FORMATS)
def test_cuda_has_products_of_all_formats(format: WeightFormat, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, f"model: self, quantization: {format}", "device: cuda")
    assert settings.draft.folder.quantization.format == format


def test_mxfp4_needs_whole_groups_on_every_rank() -> None:
    config = read_model_folder(TARGET).config
    problem = Quantization(format="mxfp4", device="cpu").problem
    assert problem(config, num_ranks=8, splits_heads=True, splits_mlps=True) is None
    assert problem(config, num_ranks=16, splits_heads=True, splits_mlps=True) == (
        "needs multiples of 32 inputs, and the model's attention features on a rank is 16"
    )
    assert problem(config, num_ranks=16, splits_heads=False, splits_mlps=True) == (
        "needs multiples of 32 inputs, and the model's intermediate size on a rank is 48"
    )
    assert problem(config, num_ranks=16, splits_heads=False, splits_mlps=False) is None


def test_a_draft_has_a_draft_where_the_file_says_so(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, f"model: {DRAFT}, draft: {{method: suffix}}")
    assert settings.draft.lower_draft == "suffix"
    assert shown_settings(settings, None, None)["draft"] == (
        "demo-draft, 8 layers, with drafts of its own from earlier text"
    )
    engine = engine_of(DRAFT, ENGINE_ROLE_DRAFT, lower_draft="suffix")
    assert engine.info.lower_draft == "suffix"
    for role, lower in ((ENGINE_ROLE_DRAFT, "lookup"), (ENGINE_ROLE_TARGET, "suffix")):
        with pytest.raises(SpecError, match=f"lower_draft '{lower}'"):
            engine_of(DRAFT, role, lower_draft=lower)


def test_kv_of_a_draft_in_fp8_is_counted_and_shown(tmp_path: Path) -> None:
    key = "model: self, quantization: int4"
    settings, exact = settings_of(tmp_path, f"{key}, kv_dtype: fp8"), settings_of(tmp_path, key)
    assert 2 * settings.draft.kv_bytes_per_token == exact.draft.kv_bytes_per_token
    assert settings.target.kv_dtype == "auto"
    assert shown_settings(settings, None, None)["draft"] == "the target's own weights in int4, 8 layers, KV in fp8"


def test_a_draft_in_fp8_drafts_nearly_what_it_would_have_drafted() -> None:
    chains, sizes = [], []
    for options in ({}, {"kv_dtype": "fp8"}):
        engine = engine_of(TARGET, ENGINE_ROLE_DRAFT, **options)
        driver = drive(engine)
        seq = driver.start(0, list(range(300, 330)), greedy())
        chains.append(list(driver.run((seq, driver.draft_row(seq, 12)))[0].token_ids))
        sizes.append(engine.info.block_bytes)
    exact, rounded = chains
    assert sizes[0] == 4 * sizes[1], "fp32 and one byte"
    assert len(rounded) == 12
    assert sum(a == b for a, b in zip(exact, rounded, strict=True)) >= 3


def test_a_model_beneath_a_draft_is_counted_and_shown(tmp_path: Path) -> None:
    key = "model: self, quantization: int4"
    settings = settings_of(tmp_path, key + f", draft: {{model: {DRAFT}}}")
    lower = settings.draft.lower
    assert lower.dtype == settings.draft.dtype
    node = Node(node_id="a" * 56, address="127.0.0.1", num_cpus=4.0, num_gpus=0)
    inventory = Inventory(nodes=(node,), head_node_id=node.node_id)
    plan = make_plan(settings, inventory)
    files = key, f"model: {DRAFT}"
    memory_alone, memory_lower = (make_plan(settings_of(tmp_path, x), inventory).bundles[1].memory for x in files)
    memory = plan.bundles[1].memory
    assert memory.weight_bytes == memory_alone.weight_bytes + memory_lower.weight_bytes
    together = settings_of(tmp_path, key + f", draft: {{model: {DRAFT}}}, placement: colocated")
    held = settings.draft.kv_bytes_per_token + lower.kv_bytes_per_token
    num_tokens = together.kv_cache_bytes("target") // together.target.kv_bytes_per_token
    assert together.kv_cache_bytes("draft") == num_tokens * held, "both levels hold what the target holds"
    note = next(note for note in plan.notes if note.startswith("the draft is made of"))
    assert "with drafts of its own from demo-draft" in note
    assert f"a token of KV takes {lower.kv_bytes_per_token} bytes more" in note
    assert any("demo-draft reads no less than one of the draft above it" in note for note in plan.notes)
    (worker,) = worker_specs(settings, plan.bundles[1:2], 1)
    spec = worker.engines[0]
    assert (spec.lower_model, spec.lower_draft) == (str(DRAFT.resolve()), "")
    made = EngineInfo(
        weight_bytes=5 << 20, kv_cache_bytes=7 << 20, lower_weight_bytes=1 << 20, lower_kv_cache_bytes=2 << 20
    )
    assert shown_settings(settings, None, made)["draft"] == (
        "the target's own weights in int4, 8 layers, with drafts of its own from demo-draft, 5.0 MiB on a rank and "
        "1.0 MiB beneath it; KV cache 7.0 MiB and 2.0 MiB"
    )


def test_the_plan_says_what_is_made(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "model: self, quantization: int4, layers: 6")
    node = Node(node_id="a" * 56, address="127.0.0.1", num_cpus=4.0, num_gpus=0)
    plan = make_plan(settings, Inventory(nodes=(node,), head_node_id=node.node_id))
    assert plan.bundles[1].memory.weight_bytes == settings.draft.weight_bytes < settings.target.weight_bytes
    note = next(note for note in plan.notes if note.startswith("the draft is made of"))
    assert "the target's own weights in int4, 6 layers" in note
    assert f"{settings.draft.kv_bytes_per_token} bytes on a rank of the draft" in note
    assert settings.draft.kv_bytes_per_token * 8 == settings.target.kv_bytes_per_token * 6


def test_a_smaller_model_can_be_rounded_too(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, f"model: {DRAFT}, quantization: int8")
    assert settings.draft.weight_bytes < read_model_folder(DRAFT).weight_bytes(1)


@pytest.mark.parametrize(
    ("role", "quantization", "message"),
    [
        (ENGINE_ROLE_DRAFT, "int3", r"quantization 'int3' must be one of int8, int4, mxfp4"),
        (ENGINE_ROLE_TARGET, "int4", r"quantization 'int4' is for a draft only: it would change the output"),
    ],
)
def test_workers_refuse_what_they_cannot_make(role: EngineRole.ValueType, quantization: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        engine_of(TARGET, role, quantization=quantization)


def test_workers_report_what_they_made() -> None:
    engine = engine_of(TARGET, ENGINE_ROLE_DRAFT, quantization="int4", num_layers=6, batch_invariant=True)
    assert (engine.info.quantization, engine.info.num_layers) == ("int4", 6)
    assert not engine.info.batch_invariant, "rounded weights do not promise it, and the output does not need it"


def engine_of(folder: Path, role: EngineRole.ValueType, **changes: object) -> Engine:
    spec = engine_spec(folder, role, **changes)
    worker = WorkerSpec(rank=0, world_size=1, device="cpu", engines=[spec])
    return load_engines(worker, Cohort(0, 1, None), lambda stage, done, total: None)[role]


def test_status_shows_what_was_made(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "model: self, quantization: int4")
    assert shown_settings(settings, None, None)["draft"] == "the target's own weights in int4, 8 layers"
    made = EngineInfo(weight_bytes=5 << 20)
    expected = "the target's own weights in int4, 8 layers, 5.0 MiB on a rank"
    assert shown_settings(settings, None, made)["draft"] == expected
    whole = settings_of(tmp_path, f"model: {DRAFT}")
    assert shown_settings(whole, None, made)["draft"] == ""


def test_status_shows_how_the_targets_weights_are_held(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "model: self, quantization: int4")
    assert shown_settings(settings, None, None)["weights"] == "bfloat16"
    assert shown_settings(settings, EngineInfo(weight_bytes=3 << 20), None)["weights"] == "bfloat16, 3.0 MiB on a rank"


def test_kv_on_disk_belongs_to_the_weights_that_were_made() -> None:
    layout = {"num_ranks": 1, "weights": "same", "device": torch.device("cpu")}
    specs = [engine_spec(TARGET, ENGINE_ROLE_DRAFT, quantization=q, num_layers=n) for q in ("", "int4") for n in (0, 3)]
    facts = [kv_facts(spec, None, **layout) for spec in specs]
    assert len({str(entry) for entry in facts}) == 4
