"""What the control plane reads from a model folder."""

import json
from pathlib import Path

import pytest

from checkpoint.errors import LoadError
from checkpoint.folder import find_model, read_model_folder
from tests.helpers.model_folders import tensors_of, write_model_folder, write_safetensors

MODELS = Path(__file__).parents[2] / "models"


def test_the_bundled_target() -> None:
    model = read_model_folder(MODELS / "demo-target")
    config = model.config
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads, config.vocab_size) == (8, 8, 4, 4096)
    assert model.eos_token_ids == (0,)
    # 2 (keys and values) x 8 layers x 4 heads x 32 x 2 bytes; half of the heads on each of two ranks.
    assert model.kv_bytes_per_token(1) == 4096
    assert model.kv_bytes_per_token(2) == 2048
    assert model.kv_bytes_per_token(8) == 1024, "4 heads for 8 ranks: each holds one"


def test_weight_bytes_count_what_a_rank_holds(tmp_path: Path) -> None:
    model = read_model_folder(write_model_folder(tmp_path / "model"))
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 64 * 32
    norms = 2 * 2 * 32 + 32
    embedding = 2 * 100 * 32
    assert model.weight_bytes(1) == 2 * (2 * layer + norms + embedding)
    assert model.weight_bytes(2) == 2 * (layer + norms + embedding // 2)
    assert read_model_folder(model.path, dtype="float32").weight_bytes(1) == 2 * model.weight_bytes(1)
    # With 8 ranks, each holds one of the 4 key-value heads whole: two eighths.
    per_rank_layer = 32 * 32 // 8 + 2 * (16 * 32 // 4) + 32 * 32 // 8 + 3 * 64 * 32 // 8
    assert model.weight_bytes(8) == 2 * (2 * per_rank_layer + norms + 2 * 13 * 32), "13 of 100 tokens"


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    untied = read_model_folder(write_model_folder(tmp_path / "untied"))
    tied = read_model_folder(write_model_folder(tmp_path / "tied", tie_word_embeddings=True))
    assert untied.weight_bytes(1) - tied.weight_bytes(1) == 2 * 100 * 32


def test_sharded_weights_are_read_through_their_index(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    whole = read_model_folder(folder)
    (folder / "model.safetensors").unlink()
    tensors = sorted(tensors_of(json.loads((folder / "config.json").read_text())).items())
    write_safetensors(folder / "model-1.safetensors", dict(tensors[:5]))
    write_safetensors(folder / "model-2.safetensors", dict(tensors[5:]))
    write_safetensors(folder / "left-over.safetensors", {"model.norm.weight": (32,)})
    names = {name: f"model-{1 if index < 5 else 2}.safetensors" for index, (name, _) in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert read_model_folder(folder).weight_bytes(2) == whole.weight_bytes(2)


def test_tensor_parallel_sizes(tmp_path: Path) -> None:
    model = read_model_folder(write_model_folder(tmp_path / "model"))
    assert model.config.tensor_parallel_remedy() == "use one of 1, 2, 4, 8"
    assert model.config.tensor_parallel_problem(3) == "does not divide the model's 8 attention heads"


def test_generation_config_names_the_tokens_that_end_a_turn(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model")
    assert read_model_folder(folder).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert read_model_folder(folder).eos_token_ids == (2, 5)


def test_an_older_file_says_torch_dtype(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "model", dtype=None, torch_dtype="float16")
    assert read_model_folder(folder).dtype == "float16"


def test_broken_folders_say_what_to_do(tmp_path: Path) -> None:
    quantised = write_model_folder(tmp_path / "q", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(LoadError, match=r"quantised \(bitsandbytes\), supported are .*; use unquantised weights"):
        read_model_folder(quantised)
    assert read_model_folder(write_model_folder(tmp_path / "null", quantization_config=None)).config.num_layers == 2
    broken = write_model_folder(tmp_path / "b", max_position_embeddings=8.5)
    with pytest.raises(LoadError, match=r"max_position_embeddings must be an integer .*, got 8\.5"):
        read_model_folder(broken)
    cut = write_model_folder(tmp_path / "cut")
    with (cut / "model.safetensors").open("rb+") as stream:
        stream.truncate(5000)
    with pytest.raises(LoadError, match=r"is truncated: \d+ bytes expected, 5000 found; download it again"):
        read_model_folder(cut)
    lfs = write_model_folder(tmp_path / "lfs")
    (lfs / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(LoadError, match="is not a safetensors file"):
        read_model_folder(lfs)
    (lfs / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"has neither"):
        read_model_folder(lfs)


def test_hub_ids_are_looked_up_in_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(LoadError, match="run: hf download org/name"):
        find_model("org/name", tmp_path)
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = write_model_folder(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc\n")
    assert find_model("org/name", tmp_path) == snapshot
    (repository / "refs" / "main").write_bytes(b"\xff")
    with pytest.raises(LoadError, match=r"refs/main is not UTF-8.*; repair it or copy it again"):
        find_model("org/name", tmp_path)


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "models" / "one")
    assert find_model("../models/one", tmp_path / "models") == folder
    with pytest.raises(LoadError, match=r"no such folder: .*/models/two"):
        find_model("../models/two", tmp_path / "models")
