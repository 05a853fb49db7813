"""Damage to model folders and deployment files: what downloads, people and other programs do to them, and what none
would. Every choice is drawn from the random generator that is passed in."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.valid_folders import read_with_header, write_with_header

Path_ = tuple[Any, ...]  # of a value inside a JSON document

_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, 7, -1, 2**31, 2**64, -(2**70), 0.0, 0.5, 1.0, 1.5, -2.5, 1e-30, 1e39, 1e308,
    float("nan"), float("inf"), "", "x", "8", "auto", "none", "\ud800", "\0", "a" * 5000, "../x", [], [1], ["x"], [[]],
    [None], {}, {"a": 1}, {"content": "x"}, [1, 2, 3], [0.5], "bfloat16", "float8", "LlamaForCausalLM",
    "model.safetensors",
]  # fmt: skip
_CONFIG_KEYS: dict[str, list[Any]] = {
    "architectures": [["MixtralForCausalLM"], ["GemmaForCausalLM"], None, "LlamaForCausalLM", ["Qwen3ForCausalLM"]],
    "hidden_act": ["gelu", "silu", None],
    "rope_scaling": [
        None,
        {"type": "longrope", "short_factor": [1.0]},
        {"type": "yarn", "factor": 2.0, "beta_fast": 1e308},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.5, "mscale_all_dim": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "linear", "factor": 1e6},
        [],
        "yarn",
    ],
    "rope_theta": [1, 1.0, 0.5, 1e6, 1e300, "1e6"],
    "tie_word_embeddings": [True, False, "false"],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "num_hidden_layers": [1, 2, 3, 10**9],
    "vocab_size": [1, 39, 40, 41, 10**12],
    "hidden_size": [2, 31, 32, 64],
    "num_attention_heads": [1, 2, 3, 8, 64],
    "num_key_value_heads": [1, 2, 3, 4, None],
    "head_dim": [0, 1, 2, 7, 8, 16, None],
    "intermediate_size": [1, 47, 48, 96],
    "max_position_embeddings": [1, 2, 1000, 10**6, 2**31],
    "rms_norm_eps": [1, 1e-6, 0, -1.0],
    "sliding_window": [1, 64, 0, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 1, 99, "1"],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"], "full_attention", [{}, {}]],
    "dtype": ["auto", "float32", ["bfloat16"], "float64"],
    "torch_dtype": ["auto", "float16", {}],
    "quantization_config": [None, {}, {"quant_method": "awq"}, "fp8", {"quant_method": [1]}],
    "eos_token_id": [0, 39, 40, -1, "x", {}, [1, 2], [], [[1]], 2**40, True, 1.0],
    "partial_rotary_factor": [0.5, 1.0, "1"],
    "num_local_experts": [0, 8],
}
_GENERATION_KEYS: dict[str, list[Any]] = {
    "temperature": [0, 0.7, -1, "hot", 1e39, 1e-50, float("nan")],
    "top_p": [0, 1, 1.5, 1e-50],
    "top_k": [-1, 0, -2, 1.5, 2**31, True],
    "min_p": [0.1, 2],
    "repetition_penalty": [1, 0, 1e-50],
    "max_new_tokens": [1, 0, 2**31, 20.0],
    "eos_token_id": _CONFIG_KEYS["eos_token_id"],
    "do_sample": [True, "x"],
}
_TOKENIZER_KEYS: dict[str, list[Any]] = {
    "chat_template": ["{% if %}", "{{ x | nofilter }}", "{% for a in b %}" * 30, 3, [], [{"name": "default"}], None,
                      "ok", [{"name": "default", "template": "x"}], {"default": "x"}, "{{" * 2000,
                      "{{ 9 ** (9 ** 9) }}"],
    "eos_token": [None, "</s>", 3, {"content": "</s>"}, {"content": 3}],
    "added_tokens_decoder": [{"2": {"content": "</s>"}}, {"x": {}}, []],
    "split_special_tokens": [True, 1],
}  # fmt: skip
_ENTRIES: dict[str, list[Any]] = {
    "dtype": ["I8", "F8_E4M3", "F64", "BF16", "F16", "F32", "nonsense"],
    "shape": [[], [1], [40, 32], [0], [-1], ["x"], [2**70, 0], [32.0]],
    "data_offsets": [[0, 0], [4, 2], [0, 2**70], [0], "x"],
}
_DEPLOYMENT_KEYS: dict[str, list[Any]] = {
    "target.tensor_parallel_size": [1, 2, 3, 4, 64],
    "target.dtype": ["bfloat16", "float32", "auto", None],
    "target.model": ["target", "draft", "", ".", "/", "\0", "x" * 5000, "a/b", "~/x", "~nobody/x", "\ud800", "loop", 3],
    "draft": [None, {}, {"model": "draft"}, {"model": "target", "placement": "colocated"}],
    "draft.tensor_parallel_size": [1, 2, 5],
    "draft.layer_parallel_size": [1, 2, 3, 64],
    "draft.layer_groups": ["auto", [[0], [1]], [[0, 1]], [], [[]], [[1], [0]]],
    "draft.layer_parallel_mlp": ["replicated", "tensor_parallel"],
    "draft.layer_parallel_weights": ["sharded", "replicated"],
    "draft.placement": ["separate", "colocated"],
    "speculation.method": ["none", "draft_model", "suffix", "hybrid"],
    "speculation.num_speculative_tokens": [1, 16, 17, "auto"],
    "speculation.pipeline": ["serial", "continuous"],
    "speculation.window": [1, 64, "auto"],
    "speculation.verdict_cache": [1, "off", False, "auto"],
    "kv_cache.block_size": [1, 3, 16, 256],
    "kv_cache.device_bytes": [1, 1000, "64KiB", "8MiB", "1TiB", "0.1b", "1e9GiB"],
    "scheduler.max_num_seqs": [1, 256, 4096],
    "scheduler.max_num_batched_tokens": [1, 256, 2**31 - 1],
    "scheduler.max_model_len": [1, 64, 256, 257, 1024, 100_000, 2**31 - 1],
    "scheduler.max_queue": [1, 2**31 - 1],
    "batch_invariant": [True, False, "auto"],
    "device": ["cpu", "cuda"],
    "cpu.threads_per_worker": [1, 4, 1024],
    "server.http_port": [None, 1, 65535, 50051],
    "server.host": ["0.0.0.0", "", "x", "::1"],
    "replicas": [{"min": 1}, {"max": 2}],
    "kv_cache.cpu_bytes": [0, 1, 1000, "4MiB", "8GiB", "1TiB", True, "x"],
    "kv_cache.disk": [None, {}, 3, {"path": "kv"}, {"path": "kv", "bytes": "8MiB"}, {"path": "kv", "bytes": 1}],
    "kv_cache.disk.path": ["kv", "", ".", "target", "deployment.yaml", "loop", "\0", "x" * 5000, "~nobody/x", 3],
    "kv_cache.disk.bytes": [1, 1000, "8MiB", "1GiB", "1000TiB", -1],
    "kv_cache.disk.write": ["all", "reused", "none"],
    "kv_cache.disk.read_only": [True, False, "yes"],
    "kv_cache.store": ["on_complete", "on_evict", "never"],
    "kv_cache.load_timeout_s": [0, 1e-300, 1, 604_800, 1e300, float("nan")],
    "scheduler.enable_prefix_caching": [True, False],
    "cpu.compile": ["auto", "off", "on", False, True],
    "collective_timeout_s": [0, 0.001, 1, 1e300],
    "startup_timeout_s": [1, 3, 1e-300, float("inf")],
    "name": ["a", "A", "a" * 64, "", 1],
    "apiVersion": ["echelon/v2"],
}
_TEXTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b"\xff\xfe",
    b"\0" * 64,
    b"[" * 100_000,
    b"version https://git-lfs\n",
    b"\xef\xbb\xbf{}",
]


def mutate_folder(folder: Path, rng: random.Random) -> str:
    """Changes one thing; returns a description for the report."""
    file = rng.choice(sorted(path for path in folder.iterdir()))
    if file.is_dir():
        return "nothing"
    if rng.random() < 0.12:
        return f"{file.name}: {_mutate_file(file, rng)}"
    if file.suffix == ".safetensors":
        return f"{file.name}: {_mutate_weights(file, rng)}"
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return f"{file.name}: {_mutate_file(file, rng)}"  # after an earlier change it is not JSON any more
    said, content = _mutate_json(content, _keys_of(file), rng)
    file.write_text(json.dumps(content))
    return f"{file.name}: {said}"


def mutate_deployment(file: Path, rng: random.Random) -> str:
    """Changes one thing in a deployment file."""
    if rng.random() < 0.1:
        return f"{file.name}: {_mutate_file(file, rng)}"
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, ValueError, RecursionError):
        content = {}
    said, content = _mutate_json(content, _DEPLOYMENT_KEYS, rng)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return f"{file.name}: {said}"


def _keys_of(file: Path) -> dict[str, list[Any]]:
    known = {
        "config.json": _CONFIG_KEYS,
        "generation_config.json": _GENERATION_KEYS,
        "tokenizer_config.json": _TOKENIZER_KEYS,
    }
    return known.get(file.name, {})


def _mutate_json(content: Any, keys: dict[str, list[Any]], rng: random.Random) -> tuple[str, Any]:
    content = copy.deepcopy(content)
    if keys and isinstance(content, dict) and rng.random() < 0.65:
        path = rng.choice(sorted(keys))
        value = rng.choice(keys[path])
        return f"{path} = {_short(value)}", _put(content, path.split("."), value)
    places = [place for place in _places(content) if place]
    if not places:
        return "nothing", content
    place = rng.choice(places)
    parent = _at(content, place[:-1])
    match rng.randrange(5):
        case 0:
            del parent[place[-1]]
            return f"without {place}", content
        case 1 if isinstance(parent, dict):
            parent[_other_name(place[-1], rng)] = parent.pop(place[-1])
            return f"{place} renamed", content
        case 2 if isinstance(parent[place[-1]], int | float) and not isinstance(parent[place[-1]], bool):
            number = parent[place[-1]]
            parent[place[-1]] = rng.choice(
                [number + 1, number - 1, number * 2, number // 2, -number, float(number), str(number)]
            )
        case 3:
            parent[place[-1]] = copy.deepcopy(_at(content, rng.choice(places)))
        case _:
            parent[place[-1]] = rng.choice(_VALUES)
    return f"{place} = {_short(parent[place[-1]])}", content


def _mutate_file(file: Path, rng: random.Random) -> str:
    content = file.read_bytes()
    match rng.randrange(7):
        case 0:
            file.unlink()
            return "gone"
        case 1:
            file.unlink()
            file.mkdir()
            return "a folder"
        case 2:
            size = rng.randrange(len(content) + 1)
            file.write_bytes(content[:size])
            return f"cut to {size} bytes"
        case 3:
            place = rng.randrange(len(content) + 1)
            file.write_bytes(content[:place] + rng.randbytes(1) + content[place + 1 :])
            return f"another byte at {place}"
        case 4:
            file.write_bytes(content + rng.choice([b"\0", b"\n", b"}"]))
            return "longer"
        case 5:
            shutil.move(file, file.with_name(rng.choice(["model.safetensors", "x.json", "config.json.bak"])))
            return "renamed"
    text = rng.choice(_TEXTS)
    file.write_bytes(text)
    return f"holds {text[:20]!r}"


def _mutate_weights(file: Path, rng: random.Random) -> str:
    try:
        header, data = read_with_header(file)
    except Exception:  # noqa: BLE001 (an earlier change has left no header)
        return _mutate_file(file, rng)
    names = [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []
    if not names or rng.random() < 0.15:
        said, header = _mutate_json(header, {}, rng)
        write_with_header(file, header, data)
        return said
    name = rng.choice(names)
    said = rng.choice([_rename, _resize, _other_dtype, _edit_entry, _drop, _add])(name, header, rng)
    write_with_header(file, header, _data_for(header, data))
    return f"{name} {said}"


def _rename(name: str, header: dict[str, Any], rng: random.Random) -> str:
    header[_other_name(name, rng)] = header.pop(name)
    return "renamed"


def _drop(name: str, header: dict[str, Any], rng: random.Random) -> str:
    del header[name]
    _lay_out(header)
    return "dropped"


def _add(name: str, header: dict[str, Any], rng: random.Random) -> str:
    new = rng.choice(
        ["lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.rotary_emb.inv_freq", "x"]
    )
    header[new] = copy.deepcopy(header[name])
    _lay_out(header)
    return f"copied as {new}"


def _resize(name: str, header: dict[str, Any], rng: random.Random) -> str:
    shape = header[name].get("shape")
    if isinstance(shape, list) and shape and all(isinstance(size, int) for size in shape):
        shape[rng.randrange(len(shape))] += rng.choice([1, -1, 8])
        _lay_out(header)
    return "resized"


def _other_dtype(name: str, header: dict[str, Any], rng: random.Random) -> str:
    header[name]["dtype"] = rng.choice(["F32", "F16", "BF16", "I8", "F64", "F8_E4M3"])
    _lay_out(header)
    return f"as {header[name]['dtype']}"


def _edit_entry(name: str, header: dict[str, Any], rng: random.Random) -> str:
    key = rng.choice(sorted(_ENTRIES))
    header[name][key] = rng.choice([*_ENTRIES[key], *_VALUES])
    return f"{key} = {_short(header[name][key])}"


def _lay_out(header: dict[str, Any]) -> None:
    """Offsets that fit shapes and types, as a writer of the format would set them."""
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "F64": 8, "F8_E4M3": 1}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__" or not isinstance(entry, dict):
            continue
        start = end
        try:
            for_all = sizes[entry["dtype"]]
            for size in entry["shape"]:
                for_all *= max(0, min(size, 10_000))
        except (KeyError, TypeError):
            continue
        end += for_all
        entry["data_offsets"] = [start, end]


def _data_for(header: dict[str, Any], data: bytes) -> bytes:
    """As many bytes as the offsets need, up to a limit."""
    ends = [0]
    for entry in header.values():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and len(offsets) == 2 and isinstance(offsets[1], int):
            ends.append(offsets[1])
    wanted = min(max(ends), 1 << 20)
    return (data + bytes(max(0, wanted - len(data))))[:wanted]


def _other_name(name: Any, rng: random.Random) -> str:
    others: list[Callable[[str], str]] = [
        lambda text: text + "x",
        lambda text: text.upper(),
        lambda text: text.replace("layers.1", "layers.2"),
        lambda text: text.replace("model.", ""),
        lambda text: "lm_head.weight",
        lambda text: "\ud800",
    ]
    return rng.choice(others)(str(name))


def _places(content: Any, path: Path_ = ()) -> Iterator[Path_]:
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _places(value, (*path, key))
    elif isinstance(content, list):
        for index, value in enumerate(content[:8]):
            yield from _places(value, (*path, index))


def _at(content: Any, path: Path_) -> Any:
    for key in path:
        content = content[key]
    return content


def _put(content: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    *parents, last = path
    place = content
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            place[parent] = {}
        place = place[parent]
    place[last] = copy.deepcopy(value)
    return content


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:60]}..."
