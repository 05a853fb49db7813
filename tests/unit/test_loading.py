"""From a model folder to a loaded model: formats, slices, and errors that say what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.errors import LoadError
from workers.collectives import SoloGroup
from workers.models.decoder import CausalLM
from workers.models.loading import load_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
LAYER_SHAPES = {
    "input_layernorm": (8,),
    "self_attn.q_proj": (24, 8),
    "self_attn.k_proj": (12, 8),
    "self_attn.v_proj": (12, 8),
    "self_attn.o_proj": (8, 24),
    "post_attention_layernorm": (8,),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
}
NUM_ELEMENTS = 2 * (2 * 8 + (24 + 12 + 12) * 8 + 8 * 24 + 3 * 12 * 8) + 2 * 11 * 8 + 8
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(autouse=True)
def weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps weights in the checkpoint's layout, so that they can be compared with it."""
    monkeypatch.setenv("ECHELON_COMPILE", "off")


class StandIn(SoloGroup):
    """One rank of several, to see what it loads: nothing is ever exchanged."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def random_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER_SHAPES.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "model.safetensors")


def load(folder: Path, *, dtype: torch.dtype = torch.float32, rank: int = 0, size: int = 1, **options: Any) -> CausalLM:
    device = torch.device("cpu")
    return load_model(folder, dtype=dtype, device=device, group=StandIn(rank, size), max_model_len=32, **options)


def parameters(model: CausalLM) -> list[Tensor]:
    """Every parameter of a model without biases or head norms."""
    found = [model.embedding.weight, model.norm, model.head.weight]
    for layer in model.layers:
        found += [layer.input_norm, layer.attention.qkv_proj.weight, layer.attention.o_proj.weight]
        found += [layer.mlp_norm, layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight]
    return found


def test_shards_and_index_load_like_a_single_file(tmp_path: Path) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    single.mkdir()
    sharded.mkdir()
    tensors = random_tensors()
    write(single, tensors)
    (sharded / "config.json").write_text(json.dumps(CONFIG))
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for one, other in zip(parameters(load(single)), parameters(load(sharded)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_converted_to_the_dtype_asked_for(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = random_tensors(stored)
    write(tmp_path, tensors)
    model = load(tmp_path, dtype=wanted)
    assert torch.equal(model.embedding.weight, tensors["model.embed_tokens.weight"].to(wanted))
    assert all(parameter.dtype == wanted for parameter in parameters(model))
    assert model.weight_bytes == NUM_ELEMENTS * wanted.itemsize


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_its_slices(tmp_path: Path, rank: int) -> None:
    tensors = random_tensors()
    write(tmp_path, tensors)
    model = load(tmp_path, rank=rank, size=2)
    layer = model.layers[1]

    def rows(name: str, size: int) -> Tensor:
        return tensors[f"model.layers.1.{name}.weight"][rank * size :][:size]

    qkv = torch.cat([rows("self_attn.q_proj", 12), rows("self_attn.k_proj", 6), rows("self_attn.v_proj", 6)])
    assert torch.equal(layer.attention.qkv_proj.weight, qkv)
    assert torch.equal(layer.mlp.gate_up_proj.weight, torch.cat([rows("mlp.gate_proj", 6), rows("mlp.up_proj", 6)]))
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(layer.mlp.down_proj.weight, down[:, rank * 6 :][:, :6])
    assert model.vocab_range == [(0, 6), (6, 11)][rank]
    assert torch.equal(model.head.weight, tensors["lm_head.weight"][slice(*model.vocab_range)])


@pytest.mark.parametrize("rank", range(4))
def test_ranks_beyond_the_kv_heads_share_them(tmp_path: Path, rank: int) -> None:
    tensors = random_tensors()
    write(tmp_path, tensors)
    model = load(tmp_path, rank=rank, size=4)
    assert model.kv_heads_per_rank == 1
    head = rank // 2  # 2 KV heads, 4 ranks
    k = model.layers[1].attention.qkv_proj.weight[6:12]
    assert torch.equal(k, tensors[K_PROJ][head * 6 :][:6])


def test_only_own_slices_are_read(tmp_path: Path) -> None:
    """Progress counts the bytes that are read: as many as the rank holds, about half of the model."""
    write(tmp_path, random_tensors())
    calls: list[tuple[int, int]] = []
    model = load(tmp_path, rank=1, size=2, progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, model.weight_bytes)
    assert calls[-1] == (model.weight_bytes, model.weight_bytes)
    assert calls == sorted(calls)
    assert model.weight_bytes < 0.6 * NUM_ELEMENTS * 4


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    write(tmp_path, tensors, tie_word_embeddings=True)
    model = load(tmp_path)
    assert model.head.weight is model.embedding.weight
    assert model.weight_bytes == (NUM_ELEMENTS - 11 * 8) * 4


def test_a_saved_copy_of_a_tied_head_must_be_a_copy(tmp_path: Path) -> None:
    tensors = random_tensors()
    write(
        tmp_path, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tie_word_embeddings=True
    )
    load(tmp_path)
    write(tmp_path, tensors, tie_word_embeddings=True)
    with pytest.raises(LoadError, match=r"tie_word_embeddings.*lm_head\.weight differs"):
        load(tmp_path)


def test_frequencies_saved_by_old_versions_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, random_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    load(tmp_path)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (without(K_PROJ), rf"tensor {K_PROJ} not in the checkpoint"),
        (without("lm_head.weight"), r"lm_head\.weight not in the checkpoint.*tie_word_embeddings"),
        (put("model.layers.0.self_attn.q_proj.bias", torch.ones(24)), r"holds tensor .*q_proj\.bias.* does not use"),
        (put("model.layers.2.input_layernorm.weight", torch.ones(8)), r"layers\.2\.input_layernorm"),
        (put(K_PROJ, torch.ones(6, 8)), rf"{K_PROJ} has shape \[6, 8\], config\.json makes it \[12, 8\]"),
        (put(K_PROJ, torch.ones(12, 8, dtype=torch.int8)), rf"{K_PROJ} is I8.*quantised"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], complaint: str) -> None:
    tensors = random_tensors()
    damage(tensors)
    write(tmp_path, tensors)
    with pytest.raises(LoadError, match=complaint) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_long_list_of_missing_tensors_is_cut(tmp_path: Path) -> None:
    write(tmp_path, {"model.norm.weight": torch.ones(8)})
    with pytest.raises(LoadError, match="and 15 more") as error:
        load(tmp_path)
    assert len(str(error.value)) < 1000


def test_a_truncated_file_says_how_many_bytes_are_missing(tmp_path: Path) -> None:
    write(tmp_path, random_tensors())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(LoadError, match=rf"truncated: {len(whole)} bytes expected, {len(whole) - 100} found"):
        load(tmp_path)
    file.write_bytes(whole[:100])
    with pytest.raises(LoadError, match=r"truncated: its header needs \d+ bytes, the file has 100"):
        load(tmp_path)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(LoadError, match="Git LFS"):
        load(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(LoadError, match="0 bytes"):
        load(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, random_tensors())
    names = dict.fromkeys(load_file(tmp_path / "model.safetensors"), "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"neither model\.safetensors nor"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(LoadError, match="convert them to safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(LoadError, match=r'model-00001-of-00001\.safetensors", which is not there'):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(LoadError, match=r"index\.json: weight_map must be an object"):
        load(tmp_path)


def test_sizes_that_do_not_split_and_lengths_out_of_range(tmp_path: Path) -> None:
    write(tmp_path, random_tensors())
    with pytest.raises(LoadError, match=r"tensor_parallel_size: 3: .*; use one of 1, 2, 4"):
        load(tmp_path, size=3)
    with pytest.raises(LoadError, match="max_model_len 33"):
        load_model(tmp_path, dtype=torch.float32, device=torch.device("cpu"), group=SoloGroup(), max_model_len=33)
