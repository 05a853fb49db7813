"""Deployment files: what they resolve to, and errors that say what to do."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from checkpoint.weights import EMBEDDING
from cluster.deployment import schema
from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.field_types import parse_size
from cluster.deployment.resolving import AUTO_NUM_SPECULATIVE_TOKENS, AUTO_VERDICT_CACHE_ROWS, SEPARATE_PIPELINE
from cluster.deployment.schema import json_schema
from cluster.deployment.settings import (
    AuthSettings,
    CpuSettings,
    KvCacheSettings,
    SchedulerSettings,
    ServerSettings,
    Settings,
    Speculation,
    SpeculationSettings,
    TlsSettings,
)
from cluster.deployment.start_time import start_time_notes, start_time_problems
from cluster.errors import ConfigError
from cluster.layer_parallel import LayerParallel
from echelon.pb import process_pb2
from tests.helpers.model_folders import TOKENS, write_model_folder

ROOT = Path(__file__).parents[2]
HEAD = "apiVersion: echelon/v1\nkind: Deployment\nname: test\n"
CPU = "device: cpu\n"
TARGET = "target: {model: target}\n"
PAIR = TARGET + "draft: {model: draft}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "target")
    write_model_folder(tmp_path / "draft", num_hidden_layers=1, max_position_embeddings=256)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "deploy.yaml"
    path.write_text(text)
    return path


def problems_of(folder: Path, text: str) -> list[str]:
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_deployment(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_the_demo_file() -> None:
    settings = load_deployment(ROOT / "deploy" / "demo.yaml")
    assert settings.target.tp_size == 2
    assert settings.draft is not None
    assert settings.method == "draft_model"
    assert settings.num_speculative_tokens == AUTO_NUM_SPECULATIVE_TOKENS
    assert settings.target.folder.path == ROOT / "models" / "demo-target", "relative to the file"
    assert (settings.server.host, settings.server.grpc_port, settings.server.http_port) == ("127.0.0.1", 50051, 8000)


def test_defaults(folder: Path) -> None:
    settings = load_deployment(write(folder, HEAD + TARGET + CPU))
    assert settings.method == "none", "without a draft there is nothing to speculate with"
    assert settings.max_model_len == 512, "the model's own limit"
    assert settings.startup_timeout_s == 120.0
    assert settings.target.dtype == "bfloat16", "the checkpoint's own"
    assert load_deployment(write(folder, HEAD + PAIR + CPU)).max_model_len == 512, "whatever the draft's is"


def test_a_scaling_that_lengthens_the_context_counts(folder: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    write_model_folder(folder / "long", rope_scaling=yarn)
    text = HEAD + "target: {model: long}\n" + CPU
    assert load_deployment(write(folder, text)).max_model_len == 4 * 512
    assert load_deployment(write(folder, text + "scheduler: {max_model_len: 2048}\n")).max_model_len == 2048
    (problem,) = problems_of(folder, text + "scheduler: {max_model_len: 2049}\n")
    assert problem.endswith("max_model_len: 2049: the target model's own limit is 2048 tokens; use at most 2048")
    dynamic = {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 256}
    write_model_folder(folder / "dynamic", rope_scaling=dynamic)
    assert load_deployment(write(folder, HEAD + "target: {model: dynamic}\n" + CPU)).max_model_len == 256


@pytest.mark.parametrize("method", ["none", "suffix"])
def test_a_method_without_a_draft_model_starts_none(folder: Path, method: str) -> None:
    settings = load_deployment(write(folder, HEAD + PAIR + CPU + f"speculation: {{method: {method}}}\n"))
    assert settings.method == method
    assert settings.draft is None
    alone = load_deployment(write(folder, HEAD + TARGET + CPU + f"speculation: {{method: {method}}}\n"))
    assert alone.method == method


def speculation(folder: Path, text: str, *, draft: str = "draft: {model: draft}\n") -> Speculation:
    return load_deployment(write(folder, HEAD + TARGET + draft + CPU + f"speculation: {{{text}}}\n")).speculation


def test_auto_adapts_and_a_number_is_kept(folder: Path) -> None:
    auto = speculation(folder, "num_speculative_tokens: auto")
    assert (auto.num_speculative_tokens, auto.adaptive) == (AUTO_NUM_SPECULATIVE_TOKENS, True)
    fixed = speculation(folder, "num_speculative_tokens: 5")
    assert (fixed.num_speculative_tokens, fixed.adaptive) == (5, False)


def test_a_colocated_draft_takes_turns_and_another_one_need_not(folder: Path) -> None:
    colocated = "draft: {model: draft, placement: colocated}\n"
    assert speculation(folder, "method: draft_model", draft=colocated).pipeline == "serial"
    assert speculation(folder, "method: draft_model").pipeline == SEPARATE_PIPELINE
    assert speculation(folder, "method: hybrid, pipeline: continuous").pipeline == "continuous"
    (problem,) = problems_of(folder, HEAD + TARGET + colocated + CPU + "speculation: {pipeline: continuous}\n")
    assert problem == (
        "line 7: speculation.pipeline: 'continuous': needs a draft on devices of its own: a colocated one takes "
        "turns with the target; use serial or draft.placement: separate"
    )


def test_the_verdict_cache_is_for_a_pipeline_that_waits_for_verdicts(folder: Path) -> None:
    assert speculation(folder, "pipeline: continuous").verdict_cache_rows == AUTO_VERDICT_CACHE_ROWS
    assert speculation(folder, "pipeline: continuous, verdict_cache: off").verdict_cache_rows == 0
    assert speculation(folder, "pipeline: continuous, verdict_cache: 3, window: 9").verdict_cache_rows == 3
    assert speculation(folder, "pipeline: continuous, verdict_cache: 3, window: 9").window == 9
    assert speculation(folder, "pipeline: serial, verdict_cache: 3").verdict_cache_rows == 0
    problem = problems_of(
        folder, HEAD + PAIR + CPU + "speculation: {pipeline: continuous, window: 3, num_speculative_tokens: 4}\n"
    )[0]
    assert "window: 3: is less than speculation.num_speculative_tokens 4; raise it or use auto" in problem


def layered(folder: Path, text: str) -> Settings:
    """A deployment with a draft of six layers and these keys."""
    if not (folder / "six").exists():
        write_model_folder(folder / "six", num_hidden_layers=6)
    return load_deployment(write(folder, HEAD + TARGET + f"draft: {{model: six, {text}}}\n" + CPU))


def test_layer_parallel_drafts(folder: Path) -> None:
    draft = layered(folder, "layer_parallel_size: 4").draft
    assert draft is not None
    assert draft.layer_parallel == LayerParallel(size=4, num_ranks=4)
    explicit = layered(
        folder,
        "layer_parallel_size: 2, layer_groups: [[0], [1, 2], [3, 4], [5]], "
        "layer_parallel_weights: sharded, layer_parallel_mlp: tensor_parallel",
    ).draft
    assert explicit is not None
    assert explicit.layer_parallel == LayerParallel(
        size=2, num_ranks=2, groups=((0,), (1, 2), (3, 4), (5,)), weights="sharded", mlps="tensor_parallel"
    )
    one_device = layered(folder, "layer_parallel_size: 4, placement: colocated").draft
    assert one_device is not None
    assert one_device.num_ranks == 1, "one batched pass"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("layer_parallel_size: 2, tensor_parallel_size: 2", "does not go together with draft.tensor_parallel_size 2"),
        ("layer_parallel_size: 7", "layer_parallel_size: 7: is more than the draft's 6 layers; use at most 6"),
        ("layer_groups: [[0], [1, 2, 3, 4, 5]]", "draft.layer_groups: needs a draft.layer_parallel_size over 1"),
        ("layer_parallel_size: 2, layer_groups: [[0], [1, 2, 3], [4, 5]]", "draft.layer_groups.1: [1, 2, 3]: has 3 "),
        ("layer_parallel_size: 2, layer_groups: [[0], [2, 3]]", "[2, 3]: names layer 2 where layer 1 is due; name "),
        ("layer_parallel_size: 2, layer_groups: [[0, 1], [2, 3]]", "names 4 layers, the draft has 6; name the layers"),
        ("layer_parallel_size: 2, layer_groups: [[0], []]", "[]: has 0 layers, a group has 1 to 2"),
        ("layer_parallel_size: 5, layer_parallel_mlp: tensor_parallel", "5 does not divide the draft's intermediate"),
        ("layer_parallel_size: 2, layer_parallel_mlp: fast", "must be 'auto', 'replicated' or 'tensor_parallel'"),
        ("layer_parallel_size: 0", "layer_parallel_size: 0: must be greater than or equal to 1"),
    ],
)
def test_impossible_layer_groups_are_refused(folder: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layered(folder, text)
    assert problem in str(caught.value)


def test_kv_cache_is_divided_so_that_both_hold_the_same_seqs(folder: Path) -> None:
    # A token takes 2 x 2 layers x 4 heads x 4 x 2 bytes = 128 on the target, 64 on the draft.
    cache = "kv_cache: {device_bytes: 192KiB}\n"
    separate = load_deployment(write(folder, HEAD + PAIR + CPU + cache))
    assert separate.kv_cache_bytes("target") == 192 << 10
    assert separate.kv_cache_bytes("draft") == 96 << 10
    colocated = load_deployment(
        write(folder, HEAD + TARGET + "draft: {model: draft, placement: colocated}\n" + CPU + cache)
    )
    assert colocated.kv_cache_bytes("target") == 128 << 10
    assert colocated.kv_cache_bytes("draft") == 64 << 10


def test_all_problems_at_once_each_with_its_line(folder: Path) -> None:
    text = HEAD + "max_model_len: 8\ntarget:\n  model: target\n  tensor-parallel-size: 2\ncpu:\n"
    assert problems_of(folder, text) == [
        "line 4: max_model_len: unknown key; did you mean scheduler.max_model_len?",
        "line 7: target.tensor-parallel-size: unknown key; did you mean target.tensor_parallel_size?",
        "line 8: cpu: must be a section of keys; fill it in or leave it out",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gpu_memory_utilisation: 0.5\n", "unknown key; did you mean kv_cache.gpu_memory_utilization?"),
        ("kv_cache: {gpu_memory_utilisation: 0.5}\n", "did you mean kv_cache.gpu_memory_utilization?"),
        ("apiversion: echelon/v1\n", "did you mean apiVersion?"),
        ("frobnicate: 1\n", "unknown key; known keys here: apiVersion, kind, name"),
        ("scheduler: {max_num_seqs: '8'}\n", "'8': must be a valid integer; write a whole number, without quotes"),
        ("cpu: {threads_per_worker: [1]}\n", "threads_per_worker: [1]: must be a valid integer; write a whole number"),
        ("batch_invariant: 'yes'\n", "'yes': must be auto or a boolean; write true or false, without quotes"),
        ("scheduler: {max_num_seqs: 0}\n", "scheduler.max_num_seqs: 0: must be greater than or equal to 1"),
        ("device: tpu\n", "device: 'tpu': must be 'cpu' or 'cuda'"),
        ("kv_cache: {disk: {path: '', bytes: 1GiB}}\n", "kv_cache.disk.path: '': is not a path; give a folder"),
        (
            'kv_cache: {disk: {path: "a\\0b", bytes: 1GiB}}\n',
            "kv_cache.disk.path: 'a\\x00b': is not a path; give a folder",
        ),
        ("kv_cache: {device_bytes: 12 parsecs}\n", "'12 parsecs': is not a size; write bytes, or a number with a unit"),
        ("speculation: {num_speculative_tokens: 17}\n", "17: must be auto or an integer from 1 to 16"),
        ("speculation: {num_speculative_tokens: true}\n", "True: must be auto or an integer from 1 to 16"),
        ("spares: -1\n", "-1: must be auto or an integer from 0 to 64"),
        ("speculation: {verdict_cache: true}\n", "True: must be auto, off or an integer from 1 to 16"),
        ("speculation: {window: 65}\n", "window: 65: must be auto or an integer from 1 to 64"),
        ("speculation: {method: ngram}\n", "'ngram': must be 'none', 'draft_model', 'suffix' or 'hybrid'"),
        ("kv_cache: {disk: {path: /x, bytes: 1GiB}}\n", "kv_cache.disk: blocks go to disk through host memory; set kv"),
        ("kv_cache: {cpu_bytes: 1GiB, disk: {path: /x}}\n", "kv_cache.disk.bytes: is missing"),
        (
            "kv_cache: {cpu_bytes: 1GiB}\nscheduler: {enable_prefix_caching: false}\n",
            "kv_cache.cpu_bytes: 1073741824: keeps prefixes, and scheduler.enable_prefix_caching is false",
        ),
        (
            "kv_cache: {tier_dtype: int8}\n",
            "kv_cache.tier_dtype: 'int8': there are no tiers below the devices; set kv_cache.cpu_bytes too",
        ),
        (
            "kv_cache: {cpu_bytes: 1GiB, tier_dtype: int4, dtype: fp8}\n",
            "kv_cache.tier_dtype: 'int4': the blocks of kv_cache.dtype fp8 have 8 bits already; leave one of them out",
        ),
        (
            "kv_cache: {store: on_evict}\n",
            "kv_cache.store: 'on_evict': there is no host memory to store blocks in; set kv_cache.cpu_bytes too",
        ),
        ("kv_cache: {cpu_bytes: 1GiB, store: lazily}\n", "kv_cache.store: 'lazily'"),
        ("kv_cache: {cpu_bytes: 1GiB, tier_dtype: int3}\n", "kv_cache.tier_dtype: 'int3'"),
        ("kv_cache: {cpu_bytes: 0}\n", "kv_cache.cpu_bytes: 0: is nothing; leave the key out"),
        ("kv_cache: {cpu_bytes: 0GiB}\n", "kv_cache.cpu_bytes: 0: is nothing; leave the key out"),
        (
            "kv_cache: {cpu_bytes: 1GiB, disk: {path: kv, bytes: 1GiB, write: all, read_only: true}}\n",
            "kv_cache.disk.write: 'all': nothing is written with kv_cache.disk.read_only; leave one of them out",
        ),
        ("replicas: {min: 3, max: 2}\n", "replicas.max: 2: is less than replicas.min, 3; raise it, or leave it out"),
        ("server: {host: 0.0.0.0}\n", "server.host: '0.0.0.0': is reachable by others"),
        ("server: {host: 0.0.0.0, insecure: false}\n", "or set server.insecure: true to insist"),
        ("server: {host: 0.0.0.0, tls: {cert: c, key: k}}\n", "so it needs server.tls and server.auth"),
        ("server: {host: 0.0.0.0, auth: {tokens_file: t}}\n", "so it needs server.tls and server.auth"),
        ("server: {tls: {cert: c}}\n", "server.tls.key: is missing"),
        ("server: {tls: {cert: c, key: ''}}\n", "server.tls.key: '': is not a path; give a file"),
        ("server: {auth: {}}\n", "server.auth.tokens_file: is missing"),
        ("startup_timeout_s: .inf\n", "startup_timeout_s: inf: must be a finite number"),
        ("scheduler: {max_queue: 5000000000}\n", "scheduler.max_queue: 5000000000: must be less than or equal to"),
        ("replicas: {target_ongoing_requests: 4}\n", "replicas.target_ongoing_requests: 4: needs replicas.max"),
        ("replicas: {max: 2, target_ongoing_requests: 0}\n", "replicas.target_ongoing_requests: 0: must be greater"),
        ("8: 1\n", "8: a key must be text; put it in quotes"),
        ("jobs: {max_bytes: 8388608TiB}\n", "jobs.max_bytes: '8388608TiB': must be less than or equal to"),
        (f"kv_cache: {{cpu_bytes: {'9' * 400}GB}}\n", "must be less than or equal to"),
        ("server: {grpc_port: 70000}\n", "server.grpc_port: 70000: must be less than or equal to 65535"),
        ("server: {grpc_port: 8000}\n", "server.http_port: 8000: is server.grpc_port too; choose another"),
        ("server: {http_port: 50051}\n", "server.http_port: 50051: is server.grpc_port too; choose another"),
    ],
)
def test_wrong_values(folder: Path, text: str, problem: str) -> None:
    base = HEAD + TARGET
    assert problem in "\n".join(problems_of(folder, base + text))


def test_attention_to_host_memory_needs_exact_blocks_there(folder: Path) -> None:
    """Then a sequence may be longer than what its device holds."""
    base = HEAD + TARGET + CPU + "attention: budgeted\nscheduler: {max_model_len: 512}\nkv_cache: {device_bytes: 32KiB"
    assert load_deployment(write(folder, base + ", cpu_bytes: 1MiB}\n")).attention == "budgeted"
    for wrong, remedy in (
        ("}", "set kv_cache.cpu_bytes too"),
        (", cpu_bytes: 1MiB, tier_dtype: int8}", "leave kv_cache.tier_dtype out"),
        (", cpu_bytes: 1MiB, store: on_evict}", "leave kv_cache.store out"),
    ):
        assert any(problem.endswith(remedy) for problem in problems_of(folder, base + wrong + "\n")), remedy


def test_not_built_keys_may_be_written_as_off(folder: Path) -> None:
    off = "server: {tls: null, auth: null, http_port: null}\nreplicas: {min: 1, max: 1}\n"
    assert load_deployment(write(folder, HEAD + TARGET + CPU + off)).http_url("") == ""


def test_http_has_a_port_unless_told_otherwise(folder: Path) -> None:
    assert load_deployment(write(folder, HEAD + TARGET + CPU)).http_url("10.0.0.1") == "http://127.0.0.1:8000"
    settings = load_deployment(write(folder, HEAD + TARGET + CPU + "server: {http_port: 8001}\n"))
    assert settings.http_url("10.0.0.1") == "http://127.0.0.1:8001"


def test_ports_of_several_gateways_may_not_meet(folder: Path) -> None:
    ports = "server: {gateways: 3, grpc_port: 8000, http_port: 8002}\n"
    assert "with 3 gateways they must be 3 apart" in problems_of(folder, HEAD + TARGET + CPU + ports)[0]
    assert load_deployment(write(folder, HEAD + TARGET + CPU + ports.replace("8002", "8003"))).server.gateways == 3


def test_insecure_lets_a_gateway_listen_on_every_address(folder: Path) -> None:
    text = HEAD + TARGET + CPU + "server: {host: 0.0.0.0, insecure: true}\n"
    assert load_deployment(write(folder, text)).server.host == "0.0.0.0"


def test_with_tls_and_tokens_a_gateway_may_listen_on_every_address(folder: Path) -> None:
    given = "server: {host: 0.0.0.0, tls: {cert: c.pem, key: /k.pem}, auth: {tokens_file: t.json}}\n"
    settings = load_deployment(write(folder, HEAD + TARGET + CPU + given))
    assert settings.server.tls == TlsSettings(cert=str(folder / "c.pem"), key="/k.pem")
    assert settings.server.auth == AuthSettings(tokens_file=str(folder / "t.json"))
    assert settings.http_url("10.0.0.1") == "https://10.0.0.1:8000"


def test_yaml_errors(folder: Path) -> None:
    assert problems_of(folder, "name: [1, 2\nkind: x\n")[0].startswith("line 2: YAML: ")
    assert problems_of(folder, "- a\n") == ["file: holds no mapping of keys; see deploy/demo.yaml"]
    repeated = HEAD + "target: {model: target}\ntarget: {model: other}\n"
    assert problems_of(folder, repeated) == ["line 5: target: is given twice, first in line 4; keep one of them"]
    assert problems_of(folder, HEAD + "cpu: &a {b: *a}\n") == [
        "line 4: cpu.b: is an alias of a section that contains it; write the keys out"
    ]
    assert problems_of(folder, HEAD + "target: {model: 2026-13-45}\n") == [
        "YAML: a value is not what it looks like: month must be in 1..12; put it in quotes, without a tag"
    ]
    assert problems_of(folder, HEAD + "cpu: !!int ''\n")[0].endswith("put it in quotes, without a tag")
    assert problems_of(folder, HEAD + "cpu: !!bool maybe\n")[0].startswith("YAML: a value is not what it looks like")
    assert problems_of(folder, HEAD + "cpu: " + "[" * 5000 + "]" * 5000 + "\n") == [
        "YAML: is nested too deeply; flatten it"
    ]
    assert problems_of(folder, HEAD + "cpu: \0\n") == ["line 4: YAML: character U+0000 is not allowed; take it out"]
    (folder / "latin.yaml").write_bytes(HEAD.encode() + b"# caf\xe9 \n")
    with pytest.raises(ConfigError, match=r"line 4: file: is not UTF-8: .*; save as UTF-8"):
        load_deployment(folder / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory; check the path"):
        load_deployment(folder / "absent.yaml")


def test_models_are_checked(folder: Path) -> None:
    write_model_folder(folder / "stranger", tokens=(*TOKENS[:5], "ba"))
    assert problems_of(folder, HEAD + "target: {model: ~no-such-user/model}\n") == [
        "line 4: target.model: '~no-such-user/model': starts with ~ and a user that does not exist; write the path out"
    ]
    (missing,) = problems_of(folder, HEAD + "target: {model: ./absent}\n")
    assert missing.startswith("line 4: target.model: './absent': there is no such folder: ")
    assert problems_of(folder, HEAD + "target:\n  model: target\n  tensor_parallel_size: 3\n" + CPU) == [
        "line 6: target.tensor_parallel_size: 3: does not divide the model's 8 attention heads; use one of 1, 2, 4, 8"
    ]
    assert problems_of(folder, HEAD + TARGET + "draft: {model: stranger}\n" + CPU) == [
        "line 5: draft.model: 'stranger': its tokeniser is not the target's: token 5 is 'ab' in the target "
        "and 'ba' in the draft, 1 of 3 common ids differ; use a draft that was trained with the target's tokeniser"
    ]


def test_contradictory_values_are_refused(folder: Path) -> None:
    assert problems_of(folder, HEAD + TARGET + CPU + "speculation: {method: draft_model}\n") == [
        "line 6: speculation.method: 'draft_model': needs a draft model; add a draft section or set method: none"
    ]
    assert problems_of(folder, HEAD + TARGET + CPU + "speculation: {method: hybrid}\n") == [
        "line 6: speculation.method: 'hybrid': needs a draft model; add a draft section or set method: suffix"
    ]
    assert problems_of(folder, HEAD + PAIR + CPU + "scheduler: {max_model_len: 513}\n") == [
        "line 7: scheduler.max_model_len: 513: the target model's own limit is 512 tokens; use at most 512"
    ]
    (kv,) = problems_of(
        folder, HEAD + TARGET + CPU + "kv_cache: {device_bytes: 32KiB}\nscheduler: {max_model_len: 512}\n"
    )
    assert "one seq of max_model_len 512 takes 65536 bytes a rank (128 a token), device_bytes is 32768" in kv
    demo = f"target: {{model: {ROOT}/models/demo-target, tensor_parallel_size: 2}}\n"
    demo += f"draft: {{model: {ROOT}/models/demo-draft}}\n" + CPU
    (kv,) = problems_of(folder, HEAD + demo + "kv_cache: {device_bytes: 5MiB}\nscheduler: {max_model_len: 2048}\n")
    assert "takes 8388608 bytes a rank of the draft (4096 a token), device_bytes is 5242880" in kv
    wide = "draft: {model: draft, placement: colocated, tensor_parallel_size: 2}\n"
    assert "no more ranks than the target" in problems_of(folder, HEAD + TARGET + CPU + wide)[0]


def test_a_default_max_model_len_fits_the_cache(folder: Path) -> None:
    settings = load_deployment(write(folder, HEAD + TARGET + CPU + "kv_cache: {device_bytes: 32KiB}\n"))
    assert settings.max_model_len == 256
    demo = f"target: {{model: {ROOT}/models/demo-target, tensor_parallel_size: 2}}\n"
    demo += f"draft: {{model: {ROOT}/models/demo-draft}}\n" + CPU + "kv_cache: {device_bytes: 5MiB}\n"
    assert load_deployment(write(folder, HEAD + demo)).max_model_len == 1280, "what the draft's device holds"


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("512MiB", 512 << 20), ("2GB", 2_000_000_000), ("1.5KiB", 1536), (" 7 ", 7), ("8 b", 8)]
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


def test_the_json_schema_knows_every_section() -> None:
    schema = json_schema()
    assert set(schema["required"]) == {"apiVersion", "kind", "name", "target"}
    assert schema["additionalProperties"] is False


def test_an_editor_accepts_sizes_with_a_unit() -> None:
    device_bytes = json_schema()["$defs"]["KvCache"]["properties"]["device_bytes"]
    assert {"type": "string"} in device_bytes["anyOf"][0]["anyOf"]


def test_any_device_may_be_asked_for_batch_invariance(folder: Path) -> None:
    """A probe on the device that has the model finds out whether the promise can be kept. By default, the workers find
    out on a CPU, and a GPU, where nobody has measured the price, is not asked."""
    for device, default in ((CPU, None), ("device: cuda\n", False)):
        text = HEAD + TARGET + device
        assert load_deployment(write(folder, text + "batch_invariant: true\n")).batch_invariant is True
        assert load_deployment(write(folder, text + "batch_invariant: false\n")).batch_invariant is False
        for automatic in ("", "batch_invariant: auto\n"):
            assert load_deployment(write(folder, text + automatic)).batch_invariant is default


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (schema.Scheduler, SchedulerSettings, process_pb2.SchedulerSection),
        (schema.Server, ServerSettings, process_pb2.ServerSection),
        (schema.Tls, TlsSettings, process_pb2.TlsSection),
        (schema.Auth, AuthSettings, process_pb2.AuthSection),
        (schema.KvCache, KvCacheSettings, None),
        (schema.Cpu, CpuSettings, None),
        (schema.Speculation, SpeculationSettings, None),
        (None, Speculation, process_pb2.SpeculationSpec),
    ],
)
def test_a_section_has_the_same_keys_all_the_way(
    section: type[schema.Section] | None, settings: Any, message: type[Message] | None
) -> None:
    """A key that is added to the schema only would be accepted and ignored."""
    keys = {field.name for field in dataclasses.fields(settings)}
    if section is not None:
        read_by_the_schema = {"insecure"}  # a permission, which the schema itself checks
        built = {key for key, field in section.model_fields.items() if field.annotation is not Any}
        assert keys == built - read_by_the_schema
    if message is not None:
        assert keys == {field.name for field in message.DESCRIPTOR.fields}


def test_unset_keys_get_defaults_and_given_ones_arrive(folder: Path) -> None:
    settings = load_deployment(write(folder, HEAD + TARGET + CPU))
    assert (settings.kv_cache, settings.server, settings.cpu) == (KvCacheSettings(), ServerSettings(), CpuSettings())
    given = "server: {grpc_port: 7, http_port: 8}\nscheduler: {max_queue: 9, enable_prefix_caching: false}\n"
    settings = load_deployment(write(folder, HEAD + TARGET + CPU + given))
    assert settings.server == ServerSettings(grpc_port=7, http_port=8)
    assert settings.scheduler == SchedulerSettings(max_model_len=512, max_queue=9, enable_prefix_caching=False)


def test_a_large_model_needs_the_time_to_read_it(folder: Path) -> None:
    settings = load_deployment(write(folder, HEAD + TARGET + CPU), startup_timeout_s=30.0)
    model = settings.target.folder
    head = dataclasses.replace(model.weights[EMBEDDING], shape=(10**6, 10**6), num_bytes=2 * 10**12)
    large = dataclasses.replace(model, weights={EMBEDDING: head}, dtype="bfloat16")
    settings = dataclasses.replace(settings, target=dataclasses.replace(settings.target, folder=large))
    (problem,) = start_time_problems(settings)
    assert str(problem).startswith("startup_timeout_s: 30: no start takes less than 102.0 s: ")
    assert "a rank of the target can take 2000.0 GB of weights; allow at least 2010;" in str(problem)
    (note,) = start_time_notes(dataclasses.replace(settings, startup_timeout_s=1800.0))
    assert "startup_timeout_s 1800 may be too short: with 2000.0 GB of weights a start takes about 2010 s" in note
    enough = dataclasses.replace(settings, startup_timeout_s=2010.0)
    assert [*start_time_problems(enough), *start_time_notes(enough)] == []
