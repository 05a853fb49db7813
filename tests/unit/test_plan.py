"""Placement: which rank goes where, and the reason when a rank has no place."""

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from checkpoint.config_json import parse_config, read_config_json
from checkpoint.memory import SAMPLING_TILE_ROWS, sampling_bytes
from childproc.tier_block import TierDtype
from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.settings import (
    CpuSettings,
    CudaSettings,
    DiskSettings,
    KvCacheSettings,
    ModelSettings,
    Pipeline,
    SchedulerSettings,
    ServerSettings,
    Settings,
    SpeculationSettings,
)
from cluster.errors import PlanError
from cluster.local import LOCAL_SCHEDULER, LocalDraft, local_settings
from cluster.planning.inventory import inventory_of, machine_facts, visible_gpus
from cluster.planning.plan import GIB, ControlProcess, Inventory, MemoryEstimate, Node, Plan, check_followed
from cluster.planning.planner import make_plan, plan_more
from cluster.planning.ranks import expected_captured_bytes, expected_sampling_bytes
from cluster.planning.tiers import Bandwidths, price_hit
from cluster.process_id import ProcessId
from cluster.processes.specs import scheduler_spec, worker_specs
from echelon.pb import process_pb2, worker_pb2
from tests.helpers.model_folders import write_model_folder
from workers.layers.rope import cos_sin_cache
from workers.process.capturing import reserved_captured_bytes
from workers.process.load import reserved_sampling_bytes
from workers.tiers.segment_store import SegmentStore

SCHEDULER = ControlProcess(id=ProcessId(role="scheduler"), node_id="n", address="127.0.0.1")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A small draft, and a target that needs a little over 1.5 GiB on each of four ranks."""
    target = write_model_folder(tmp_path / "target", hidden_size=4096, intermediate_size=16384, num_hidden_layers=12)
    return target, write_model_folder(tmp_path / "draft")


def gpu_settings(pair: tuple[Path, Path], tp_size: int, *, draft: bool = True, colocated: bool = False) -> Settings:
    target, small = pair
    return local_settings(
        target, tp_size=tp_size, draft=LocalDraft(folder=small, colocated=colocated) if draft else None, device="cuda"
    )


def gpu_nodes(*num_gpus: int, memory_gib: int | None = 80) -> Inventory:
    nodes = tuple(
        Node(
            node_id=f"node-{index}",
            address=f"10.0.0.{index}",
            num_cpus=8,
            num_gpus=count,
            gpu_memory_bytes=None if memory_gib is None else memory_gib * GIB,
        )
        for index, count in enumerate(num_gpus)
    )
    return Inventory(nodes=nodes, head_node_id="node-0")


def cpu_nodes(*num_cpus: float, address: str | None = None, idle: bool = True, memory_gib: int = 64) -> Inventory:
    nodes = tuple(
        Node(
            node_id=f"node-{index}",
            address=address or f"10.0.0.{index}",
            num_cpus=count,
            num_gpus=0,
            cores=tuple(range(int(count))) if idle else (),
            memory_bytes=memory_gib * GIB,
        )
        for index, count in enumerate(num_cpus)
    )
    return Inventory(nodes=nodes, head_node_id="node-0")


def where(plan: Plan) -> list[str]:
    return [f"{bundle.name}@{bundle.node_id}" for bundle in plan.bundles]


def test_target_and_draft_share_a_node_but_no_device(pair: tuple[Path, Path]) -> None:
    plan = make_plan(gpu_settings(pair, 4), gpu_nodes(0, 4, 5, 8))
    assert where(plan) == [f"target-0.{rank}@node-2" for rank in range(4)] + ["draft-0.0@node-2"]
    assert all(bundle.num_gpus == 1 for bundle in plan.bundles)
    assert plan.replicas[0].scheduler.node_id == "node-2", "beside the target's leader"
    assert plan.gateways[0].process.node_id == "node-0", "on the head node"


@pytest.mark.parametrize(
    ("host", "places"),
    [
        ("0.0.0.0", [("node-0", 0), ("node-1", 0), ("node-0", 1)]),
        ("10.0.0.0", [("node-0", 0), ("node-0", 1), ("node-0", 2)]),
    ],
)
def test_gateways_go_to_nodes_of_their_own_where_they_can_listen(
    pair: tuple[Path, Path], host: str, places: list[tuple[str, int]]
) -> None:
    """Those that share a node have ports of their own."""
    server = ServerSettings(host=host, gateways=3)
    plan = make_plan(replace(gpu_settings(pair, 1, draft=False), server=server), gpu_nodes(1, 1))
    assert [(each.process.node_id, each.port_offset) for each in plan.gateways] == places
    assert [each.process.name for each in plan.gateways] == ["gateway-0", "gateway-1", "gateway-2"]
    assert server.at(2) == replace(server, grpc_port=50053, http_port=8002)


def test_the_draft_goes_elsewhere_if_the_targets_node_is_full(pair: tuple[Path, Path]) -> None:
    plan = make_plan(gpu_settings(pair, 4), gpu_nodes(0, 4, 1))
    assert where(plan) == [f"target-0.{rank}@node-1" for rank in range(4)] + ["draft-0.0@node-2"]


def test_a_group_that_fits_no_node_spreads_over_as_few_as_possible(pair: tuple[Path, Path]) -> None:
    plan = make_plan(gpu_settings(pair, 4, draft=False), gpu_nodes(1, 2, 3))
    assert [bundle.node_id for bundle in plan.bundles] == ["node-2", "node-2", "node-2", "node-1"]


def test_a_colocated_draft_takes_no_device(pair: tuple[Path, Path]) -> None:
    plan = make_plan(gpu_settings(pair, 2, colocated=True), gpu_nodes(2))
    assert [bundle.engines for bundle in plan.bundles] == [("target", "draft"), ("target",)]


def test_colocated_engines_divide_the_gpu_by_tokens(pair: tuple[Path, Path]) -> None:
    settings = gpu_settings(pair, 1, colocated=True)
    plan = make_plan(settings, gpu_nodes(1))
    (spec,) = worker_specs(settings, plan.replicas[0].group("target"), incarnation=1)
    target, draft = (engine.kv_cache_bytes for engine in spec.engines)
    assert settings.draft is not None
    assert target // settings.target.kv_bytes_per_token == draft // settings.draft.kv_bytes_per_token > 0
    assert target + draft <= plan.bundles[0].memory.kv_cache_bytes
    with pytest.raises(PlanError, match="GPU memory is not known"):
        make_plan(settings, gpu_nodes(1, memory_gib=None))


def test_too_few_gpus_names_the_bundle_and_each_node(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(gpu_settings(pair, 4), gpu_nodes(0, 3, 1))
    message = str(caught.value)
    assert message.startswith("no place for draft rank 0: it needs 1 GPU")
    assert "node node-0 (10.0.0.0): no free GPU" in message
    assert "device: cpu" not in message
    with pytest.raises(PlanError, match=r"no free GPU; .*; to run on cores, set device: cpu"):
        make_plan(gpu_settings(pair, 2), gpu_nodes(0))
    assert "node node-1 (10.0.0.1): 3 free, 3 of them planned already" in message
    assert "placement: colocated" in message


def test_a_gpu_that_is_too_small_is_not_chosen(pair: tuple[Path, Path]) -> None:
    settings = gpu_settings(pair, 4, draft=False)
    with pytest.raises(
        PlanError, match=r"no place for target rank 0: .* 0\.90 GiB a GPU at this gpu_memory_utilization"
    ):
        make_plan(settings, gpu_nodes(4, memory_gib=1))
    make_plan(settings, gpu_nodes(4, memory_gib=4))


def test_memory_of_a_rank(pair: tuple[Path, Path]) -> None:
    settings = gpu_settings(pair, 4, draft=False)
    memory = make_plan(settings, gpu_nodes(4)).bundles[0].memory
    assert memory.weight_bytes == settings.target.folder.weight_bytes(4)
    assert memory.total_bytes == int(80 * GIB * 0.9), "the KV cache takes what gpu_memory_utilization leaves"
    unknown = make_plan(settings, gpu_nodes(4, memory_gib=None))
    assert "GPU memory is not known" in unknown.notes[0]


def test_every_rank_gets_its_own_cores(pair: tuple[Path, Path]) -> None:
    settings = replace(gpu_settings(pair, 2), device="cpu", cpu=CpuSettings(threads_per_worker=2))
    plan = make_plan(settings, cpu_nodes(8))
    assert [bundle.cpu_ids for bundle in plan.bundles] == [(0, 1), (2, 3), (4, 5)]
    assert [bundle.num_cpus for bundle in plan.bundles] == [2.0] * 3
    assert plan.notes == ()


def test_ranks_share_cores_if_there_are_too_few(pair: tuple[Path, Path]) -> None:
    settings = replace(gpu_settings(pair, 2), device="cpu")
    plan = make_plan(settings, cpu_nodes(2))
    assert [bundle.cpu_ids for bundle in plan.bundles] == [()] * 3
    assert sum(bundle.num_cpus for bundle in plan.bundles) <= 2.0
    assert plan.notes == ("cores are shared on 10.0.0.0: 3 workers need 3 cores, 2 are idle",)
    spread = make_plan(settings, cpu_nodes(1, 1))
    assert [bundle.node_id for bundle in spread.bundles] == ["node-0", "node-0", "node-1"]


def test_ray_nodes_of_one_machine_share_its_cores(pair: tuple[Path, Path]) -> None:
    settings = replace(gpu_settings(pair, 2), device="cpu")
    plan = make_plan(settings, cpu_nodes(2, 2, address="10.0.0.9"))
    assert where(plan) == ["target-0.0@node-0", "target-0.1@node-0", "draft-0.0@node-1"]
    assert [bundle.cpu_ids for bundle in plan.bundles] == [()] * 3, "three workers, two cores on that machine"


def test_no_rank_is_pinned_if_others_use_the_cores(pair: tuple[Path, Path]) -> None:
    settings = replace(gpu_settings(pair, 2), device="cpu")
    plan = make_plan(settings, cpu_nodes(8, idle=False))
    assert [bundle.cpu_ids for bundle in plan.bundles] == [()] * 3
    assert [bundle.num_cpus for bundle in plan.bundles] == [1.0] * 3


def test_no_cpu_and_too_little_memory(pair: tuple[Path, Path]) -> None:
    settings = replace(gpu_settings(pair, 2), device="cpu")
    with pytest.raises(PlanError, match=r"no place for target rank 0: no free CPU on node node-0"):
        make_plan(settings, cpu_nodes(0))
    with pytest.raises(PlanError, match=r"target-0\.0, target-0\.1, draft-0\.0 on node .* 1\.00 GiB is free; lower"):
        make_plan(settings, cpu_nodes(8, memory_gib=1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tp_size": 4}, "sums over 4 ranks"),
        ({"dtype": "float16"}, "float16"),
        ({"cpu": CpuSettings(compile="off")}, "cpu.compile is off"),
        ({}, None),
        ({"tp_size": 4, "batch_invariant": True}, None),
    ],
)
def test_the_plan_says_why_output_will_be_exact_up_to_near_ties_only(
    pair: tuple[Path, Path], changes: dict[str, Any], reason: str | None
) -> None:
    plan = make_plan(local_settings(pair[0], **changes), cpu_nodes(8))
    notes = [note for note in plan.notes if "batch_invariant" in note]
    assert len(notes) == (reason is not None)
    assert reason is None or reason in notes[0]


def test_a_draft_of_a_shorter_context_is_planned_for_it(tmp_path: Path) -> None:
    target = write_model_folder(tmp_path / "target")
    short = write_model_folder(tmp_path / "draft", max_position_embeddings=96)
    settings = gpu_settings((target, short), 1)
    plan = make_plan(settings, gpu_nodes(2))
    assert settings.max_model_len == 512
    assert plan.notes == ("the draft model's own limit is 96 tokens: beyond them a seq continues without drafts",)
    lengths = {
        role: worker_specs(settings, plan.replicas[0].group(role), 1)[0].engines[0].max_model_len
        for role in ("target", "draft")
    }
    assert lengths == {"target": 512, "draft": 96}


def test_the_smallest_gpu_for_colocated_engines_holds_one_longest_seq(tmp_path: Path) -> None:
    """Both get KV cache for the same number of tokens, so the draft's shorter context saves nothing."""
    target = write_model_folder(tmp_path / "target")
    short = write_model_folder(tmp_path / "draft", max_position_embeddings=96)
    settings = gpu_settings((target, short), 1, colocated=True)

    def gpu_of(num_bytes: int) -> Inventory:
        (node,) = gpu_nodes(1).nodes
        return Inventory(nodes=(replace(node, gpu_memory_bytes=num_bytes),), head_node_id=node.node_id)

    def is_too_small(num_bytes: int) -> bool:
        try:
            make_plan(settings, gpu_of(num_bytes))
        except PlanError:
            return True
        return False

    enough = next(size for size in range(0, GIB, 4096) if not is_too_small(size))
    (spec,) = worker_specs(settings, make_plan(settings, gpu_of(enough)).replicas[0].group("target"), incarnation=1)
    assert spec.engines[0].kv_cache_bytes >= settings.max_model_len * settings.target.kv_bytes_per_token


@pytest.mark.parametrize(("colocated", "num_tables"), [(False, 1), (True, 2)])
def test_the_plan_counts_the_rotary_tables_of_a_rank(tmp_path: Path, colocated: bool, num_tables: int) -> None:
    folder = write_model_folder(tmp_path / "model", max_position_embeddings=4096)

    def memory(max_model_len: int) -> MemoryEstimate:
        settings = local_settings(
            folder,
            draft=LocalDraft(folder=folder, colocated=colocated),
            scheduler=SchedulerSettings(max_model_len=max_model_len),
        )
        return make_plan(settings, cpu_nodes(8)).bundles[0].memory

    config = parse_config(read_config_json(folder))
    more = cos_sin_cache(config.rope, head_dim=config.head_dim, num_positions=1000, device=torch.device("cpu"))
    assert memory(4000).total_bytes - memory(3000).total_bytes == num_tables * more.nbytes


def test_each_replica_has_devices_and_a_scheduler_of_its_own(pair: tuple[Path, Path]) -> None:
    settings = replace(gpu_settings(pair, 2), num_replicas=3, max_replicas=3)
    plan = make_plan(settings, gpu_nodes(3, 6))
    assert where(plan) == [
        f"{role}-{replica}.{rank}@{node}"
        for replica, node in ((0, "node-0"), (1, "node-1"), (2, "node-1"))
        for role, rank in (("target", 0), ("target", 1), ("draft", 0))
    ], "the parts of a replica stay together"
    schedulers = [(replica.scheduler.name, replica.scheduler.node_id) for replica in plan.replicas]
    assert schedulers == [("scheduler-0", "node-0"), ("scheduler-1", "node-1"), ("scheduler-2", "node-1")]
    with pytest.raises(PlanError, match="no place for target rank 0 of replica 2: it needs 1 GPU"):
        make_plan(settings, gpu_nodes(3, 3))


def test_replicas_on_cores(pair: tuple[Path, Path]) -> None:
    _, small = pair
    settings = local_settings(small, draft=LocalDraft(folder=small), num_replicas=2)
    plan = make_plan(settings, cpu_nodes(2, 2))
    assert where(plan) == ["target-0.0@node-0", "draft-0.0@node-0", "target-1.0@node-1", "draft-1.0@node-1"]
    shared = make_plan(settings, cpu_nodes(1))
    assert sum(bundle.num_cpus for bundle in shared.bundles) <= 1


def test_replicas_share_a_nodes_disk_in_folders_of_their_own(pair: tuple[Path, Path]) -> None:
    settings = with_kv(replace(gpu_settings(pair, 1), num_replicas=2, max_replicas=2))
    together = make_plan(settings, gpu_nodes(4))
    specs = [worker_specs(settings, replica.group("target"), 1)[0].engines[0].tiers for replica in together.replicas]
    assert [spec.replica for spec in specs] == [0, 1]
    assert {spec.disk_node_bytes for spec in specs} == {4 * GIB}
    assert sum(sum(bundle.disk_bytes.values()) for bundle in together.bundles) <= 4 * GIB
    alone = make_plan(with_kv(gpu_settings(pair, 1)), gpu_nodes(4))
    assert specs[0].num_host_slots == pytest.approx(alone.bundles[0].num_host_slots / 2, abs=1)


def test_more_replicas_come_on_what_is_free_with_shares_that_were_kept_for_them(pair: tuple[Path, Path]) -> None:
    one = with_kv(replace(gpu_settings(pair, 2), max_replicas=2))
    before = make_plan(one, gpu_nodes(3, 0))
    after = plan_more(before, one, gpu_nodes(0, 3), 2)
    assert after.replicas[0] == before.replicas[0]
    assert where(after)[3:] == [f"{name}@node-1" for name in ("target-1.0", "target-1.1", "draft-1.0")]
    assert {bundle.address for bundle in after.replicas[1].bundles} == {"10.0.0.1"}, "the gateway is elsewhere"
    kept = [(bundle.num_host_slots, dict(bundle.disk_bytes)) for bundle in before.bundles]
    assert [(bundle.num_host_slots, dict(bundle.disk_bytes)) for bundle in after.bundles] == kept * 2
    assert sum(sum(bundle.disk_bytes.values()) for bundle in after.bundles) <= 4 * GIB, "also on one node"
    beside = plan_more(before, one, gpu_nodes(3, 0), 2)
    assert {bundle.address for bundle in beside.replicas[1].bundles} == {"127.0.0.1"}
    with pytest.raises(PlanError, match="no place for draft rank 0 of replica 1"):
        plan_more(before, one, gpu_nodes(0, 2), 2)


def test_connections_of_a_single_machine_stay_local(pair: tuple[Path, Path]) -> None:
    settings = gpu_settings(pair, 1)
    alone = make_plan(settings, gpu_nodes(2))
    assert {bundle.address for bundle in alone.bundles} == {"127.0.0.1"}
    assert alone.replicas[0].scheduler.address == "127.0.0.1"
    apart = make_plan(settings, gpu_nodes(1, 1))
    assert [bundle.address for bundle in apart.bundles] == ["10.0.0.0", "10.0.0.1"]


def test_a_plan_that_ray_did_not_follow_is_an_error(pair: tuple[Path, Path]) -> None:
    bundles = make_plan(gpu_settings(pair, 2, draft=False), gpu_nodes(2)).bundles
    check_followed(bundles, {0: "node-0", 1: "node-0"})
    with pytest.raises(PlanError, match=r"did not follow the plan: target-0\.1: wanted node node-0, got node-7$"):
        check_followed(bundles, {0: "node-0", 1: "node-7"})


def test_visible_gpus_are_those_that_cuda_shows() -> None:
    listing = "0, GPU-aa, 81920\n1, GPU-bb, 81920\n2, GPU-cc, 40960\n"
    assert [gpu.device_id for gpu in visible_gpus(listing, None)] == ["0", "1", "2"]
    assert [gpu.device_id for gpu in visible_gpus(listing, "2,GPU-aa")] == ["2", "0"]
    assert visible_gpus(listing, "2")[0].memory_bytes == 40 * GIB
    assert visible_gpus(listing, "") == ()
    shared = visible_gpus("0, GPU-aa, [N/A]\n", None)
    assert [gpu.memory_bytes for gpu in shared] == [None]
    assert replace(machine_facts(), gpus=(*shared, *visible_gpus(listing, None))).gpu_memory_bytes is None


def layered(
    pair: tuple[Path, Path],
    size: int,
    *,
    tp_size: int = 2,
    scheduler: SchedulerSettings = LOCAL_SCHEDULER,
    speculation: SpeculationSettings = SpeculationSettings(),
    **draft: Any,
) -> Settings:
    target, _ = pair
    folder = target.parent / "layered"
    if not folder.exists():
        write_model_folder(folder, num_hidden_layers=8, hidden_size=1024, intermediate_size=4096)
    return local_settings(
        target,
        tp_size=tp_size,
        draft=LocalDraft(folder=folder, layer_parallel_size=size, **draft),
        device="cuda",
        scheduler=scheduler,
        speculation=speculation,
    )


def test_layer_parallel_ranks_get_their_own_devices(pair: tuple[Path, Path]) -> None:
    settings = layered(pair, 4, layer_groups=[[0], [1, 2, 3], [4, 5, 6], [7]])
    plan = make_plan(settings, gpu_nodes(2, 4))
    assert where(plan) == [f"target-0.{rank}@node-0" for rank in range(2)] + [
        f"draft-0.{rank}@node-1" for rank in range(4)
    ]
    (engine,) = worker_specs(settings, plan.replicas[0].group("draft"), 1)[3].engines
    assert (engine.lp_size, engine.tp_size) == (4, 1)
    assert [list(group.layers) for group in engine.layer_groups] == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert (engine.layer_parallel_weights, engine.layer_parallel_mlp) == ("replicated", "auto")


def test_layers_of_a_colocated_draft_share_a_device_if_the_target_has_fewer(pair: tuple[Path, Path]) -> None:
    batched = make_plan(layered(pair, 4, colocated=True), gpu_nodes(2))
    assert [bundle.engines for bundle in batched.bundles] == [("target", "draft"), ("target",)]
    assert batched.notes == ("attention of 4 draft layers at once is one batched pass on target rank 0",)
    spread = make_plan(layered(pair, 4, colocated=True, tp_size=4), gpu_nodes(4))
    assert [bundle.engines for bundle in spread.bundles] == [("target", "draft")] * 4
    assert spread.notes == ()


def test_sharded_layers_take_a_share_of_the_memory(pair: tuple[Path, Path]) -> None:
    def draft_of(**options: Any) -> ModelSettings:
        return layered(pair, 4, **options).model("draft")

    whole, sharded = draft_of(), draft_of(layer_parallel_weights="sharded")
    assert sharded.kv_bytes_per_token * 4 == whole.kv_bytes_per_token, "two of eight layers"
    attention, embedding = 8 * (2 * 32 * 1024 + 2 * 16 * 1024 + 1024) * 2, 100 * 1024 * 2
    assert whole.weight_bytes - sharded.weight_bytes == (attention + embedding) * 3 // 4
    cut = draft_of(layer_parallel_mlp="tensor_parallel")
    assert whole.weight_bytes - cut.weight_bytes == 8 * 3 * 4096 * 1024 * 2 * 3 // 4


def test_branches_of_the_verdict_cache_get_slots_of_the_draft(pair: tuple[Path, Path]) -> None:
    def slots(pipeline: Pipeline, max_num_seqs: int) -> tuple[int, int]:
        speculation = SpeculationSettings(pipeline=pipeline, verdict_cache=3)
        scheduler = SchedulerSettings(max_num_seqs=max_num_seqs)
        settings = layered(pair, 1, speculation=speculation, scheduler=scheduler)
        plan = make_plan(settings, gpu_nodes(3))
        (target,) = worker_specs(settings, plan.replicas[0].group("target"), 1)[0].engines
        (draft,) = worker_specs(settings, plan.replicas[0].group("draft"), 1)[0].engines
        return target.max_num_seqs, draft.max_num_seqs

    assert slots("continuous", 4) == (4, 16)
    assert slots("continuous", 100) == (100, 164), "64 branches at most"
    assert slots("serial", 4) == (4, 4)


def test_the_spec_of_the_scheduler_says_how_to_speculate(pair: tuple[Path, Path]) -> None:
    def told(**options: Any) -> process_pb2.SpeculationSpec:
        return scheduler_spec(
            layered(pair, 1, speculation=SpeculationSettings(**options)),
            process=SCHEDULER,
            target=endpoint,
            draft=endpoint,
        ).speculation

    endpoint = process_pb2.GroupEndpoint(address="127.0.0.1:1", incarnation=1)
    assert told(
        method="hybrid", pipeline="continuous", window=12, verdict_cache=2, num_speculative_tokens=6
    ) == process_pb2.SpeculationSpec(
        method="hybrid", pipeline="continuous", num_speculative_tokens=6, window=12, verdict_cache_rows=2
    )
    assert told().adaptive
    assert told(method="none") == process_pb2.SpeculationSpec(method="none", pipeline="serial")


@pytest.mark.parametrize("max_num_seqs", [1, 8, 256, 1000])
@pytest.mark.parametrize("layer_parallel_size", [1, 2])
def test_plan_and_worker_reserve_the_same_memory_for_sampling(
    pair: tuple[Path, Path], max_num_seqs: int, layer_parallel_size: int
) -> None:
    target, draft = pair
    settings = local_settings(
        target,
        tp_size=2,
        draft=LocalDraft(folder=draft, layer_parallel_size=layer_parallel_size),
        device="cuda",
        scheduler=SchedulerSettings(max_num_seqs=max_num_seqs, max_num_batched_tokens=2048),
    )
    bundles = make_plan(settings, gpu_nodes(8)).bundles
    models = [settings.target, settings.draft]
    for model in models:
        assert model is not None
        of_model = [bundle for bundle in bundles if model.role in bundle.engines]
        spec = worker_specs(settings, of_model, 1)[0].engines[0]
        vocab_size = model.folder.config.vocab_size
        reserved = reserved_sampling_bytes(spec, vocab_size=vocab_size, num_ranks=model.num_ranks)
        assert reserved == expected_sampling_bytes(model, settings)
        most = sampling_bytes(vocab_size=vocab_size, num_ranks=model.num_ranks, num_rows=SAMPLING_TILE_ROWS)
        assert reserved <= most


@pytest.mark.parametrize("graphs", ["auto", "off"])
@pytest.mark.parametrize("layer_parallel_size", [1, 2])
def test_plan_and_worker_reserve_the_same_memory_for_captured_steps(
    pair: tuple[Path, Path], layer_parallel_size: int, graphs: Literal["auto", "off"]
) -> None:
    target, draft = pair
    settings = local_settings(
        target,
        tp_size=2,
        draft=LocalDraft(folder=draft, layer_parallel_size=layer_parallel_size),
        device="cuda",
        cuda=CudaSettings(graphs=graphs),
    )
    bundles = make_plan(settings, gpu_nodes(8)).bundles
    for model in (settings.target, settings.draft):
        assert model is not None
        of_model = [bundle for bundle in bundles if model.role in bundle.engines]
        spec = worker_specs(settings, of_model, 1)[0].engines[0]
        reserved = reserved_captured_bytes(spec, model.folder.config, num_ranks=model.num_ranks, value_bytes=2)
        assert reserved == expected_captured_bytes(model, settings)
        is_captured = graphs == "auto" and model.layer_parallel is None
        assert (reserved > 0) == is_captured
        assert spec.captured_new_tokens == (0 if not is_captured else 9 if model.role == "target" else 2)


def test_nothing_is_captured_on_a_cpu(pair: tuple[Path, Path]) -> None:
    settings = local_settings(pair[0], kv_cache=KvCacheSettings(device_bytes=GIB))
    assert expected_captured_bytes(settings.target, settings) == 0


# host memory and disk


def with_kv(settings: Settings, *, cpu_bytes: int = GIB, disk_bytes: int = 4 * GIB) -> Settings:
    disk = DiskSettings(path="/kv", bytes=disk_bytes) if disk_bytes else None
    return replace(settings, kv_cache=KvCacheSettings(cpu_bytes=cpu_bytes, disk=disk))


@pytest.mark.parametrize(
    ("tp_size", "num_gpus", "options"),
    [
        (1, [2], {}),
        (2, [3], {}),
        (2, [2, 1], {}),
        (1, [1, 1], {"draft_is_larger": True}),
        (1, [1], {"colocated": True}),
        (2, [2], {"colocated": True}),
    ],
    ids=["separate", "tp 2", "two nodes", "two nodes, larger draft", "colocated", "colocated, tp 2"],
)
def test_engines_hold_the_same_number_of_blocks_in_each_tier(
    tmp_path: Path, pair: tuple[Path, Path], tp_size: int, num_gpus: list[int], options: dict[str, bool]
) -> None:
    """Of the same prefixes; the fullest node uses what it may; and the disk holds what the plan says."""
    models = pair[::-1] if options.get("draft_is_larger") else pair
    settings = with_kv(gpu_settings(models, tp_size, colocated=options.get("colocated", False)))
    plan = make_plan(settings, gpu_nodes(*num_gpus))
    tiers = {
        engine.role: engine.tiers
        for role in ("target", "draft")
        for spec in worker_specs(settings, plan.replicas[0].group(role), incarnation=1)
        for engine in spec.engines
    }
    assert len(tiers) == 2
    (num_slots,) = {spec.num_host_slots for spec in tiers.values()}
    host, disk, block = Counter[str](), Counter[str](), Counter[str]()  # bytes on each node
    capacity = set[int]()
    for bundle in plan.bundles:
        for engine in bundle.engines:
            block_bytes = settings.kv_cache.block_size * settings.model(engine).kv_bytes_per_token
            spec = tiers[worker_pb2.EngineRole.Value(f"ENGINE_ROLE_{engine.upper()}")]
            assert spec.disk_bytes == bundle.disk_bytes[engine]
            capacity.add(capacity_of(tmp_path / f"{bundle.name} {engine}", spec.disk_bytes, settings.model(engine)))
            assert spec.disk_node_bytes == 4 * GIB
            block[bundle.node_id] += block_bytes
            host[bundle.node_id] += num_slots * block_bytes
            disk[bundle.node_id] += spec.disk_bytes
    for used, limit in ((host, GIB), (disk, 4 * GIB)):
        assert all(num_bytes <= limit for num_bytes in used.values())
        assert any(used[node_id] + block[node_id] > limit for node_id in used)
    assert {bundle.num_host_slots for bundle in plan.bundles} == {num_slots}
    assert {bundle.num_disk_blocks for bundle in plan.bundles} == {min(capacity)}
    assert sum(bundle.memory.host_bytes for bundle in plan.bundles) == host.total()


def capacity_of(folder: Path, num_bytes: int, model: ModelSettings) -> int:
    """Blocks that a rank really has room for."""
    block_bytes, layout = KvCacheSettings().block_size * model.kv_bytes_per_token, {"role": model.role}
    num_parts = model.num_kv_layers
    store = SegmentStore.open(folder, block_bytes=block_bytes, num_parts=num_parts, max_bytes=num_bytes, layout=layout)
    store.close()
    return store.capacity


def test_host_memory_without_room_for_a_block_names_its_key(pair: tuple[Path, Path]) -> None:
    settings = with_kv(gpu_settings(pair, 2), cpu_bytes=1000)
    problem = r"^kv_cache\.cpu_bytes: 1,000 bytes hold no block: .* takes [\d,]+ bytes; raise it"
    with pytest.raises(PlanError, match=problem):
        make_plan(settings, gpu_nodes(3))


def test_a_disk_without_room_for_two_segments_says_what_is_enough(pair: tuple[Path, Path]) -> None:
    settings = with_kv(gpu_settings(pair, 2), disk_bytes=1000)
    with pytest.raises(PlanError, match=r"^kv_cache\.disk\.bytes: 1,000 bytes hold no two segments") as caught:
        make_plan(settings, gpu_nodes(3))
    least = int(str(caught.value).rpartition(" ")[2].replace(",", ""))
    assert make_plan(with_kv(settings, disk_bytes=least), gpu_nodes(3)).bundles[0].num_disk_blocks > 0
    with pytest.raises(PlanError):
        make_plan(with_kv(settings, disk_bytes=least - 1), gpu_nodes(3))


def plan_of_disk(pair: tuple[Path, Path], path: Path, *, read_only: bool = False, num_bytes: int = GIB) -> Plan:
    """On this machine."""
    settings = with_kv(replace(gpu_settings(pair, 1, draft=False), device="cpu"))
    disk = DiskSettings(path=str(path), bytes=num_bytes, read_only=read_only)
    facts = replace(machine_facts(disk), memory_bytes=None)
    return make_plan(replace(settings, kv_cache=replace(settings.kv_cache, disk=disk)), inventory_of(facts))


def test_a_missing_folder_or_one_of_ours_is_accepted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plan_of_disk(pair, tmp_path / "new" / "kv")
    (tmp_path / "kv" / ("0" * 32)).mkdir(parents=True)
    (tmp_path / "kv" / "lock").touch()
    plan_of_disk(pair, tmp_path / "kv")
    plan_of_disk(pair, tmp_path / "kv", read_only=True)


def test_a_path_that_cannot_be_a_disk_tier_is_refused_before_anything_starts(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "shared").mkdir(mode=0o755)
    (tmp_path / "shared" / "notes").touch()
    where = r"^kv_cache\.disk\.path: on node local \(127\.0\.0\.1\): "
    for path in (tmp_path / "file", tmp_path / "file" / "kv"):
        with pytest.raises(PlanError, match=f"{where}{tmp_path}/file is a file; give a folder"):
            plan_of_disk(pair, path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(PlanError, match=f"{where}{tmp_path}/loop is a link that leads nowhere; give a folder"):
        plan_of_disk(pair, tmp_path / "loop")
    with pytest.raises(PlanError, match=f"{where}{tmp_path}/kv does not exist, and read_only reads what another"):
        plan_of_disk(pair, tmp_path / "kv", read_only=True)
    with pytest.raises(
        PlanError, match=f"{tmp_path}/shared holds other files, like notes, .* like {tmp_path}/shared/kv"
    ):
        plan_of_disk(pair, tmp_path / "shared")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write everywhere
    with pytest.raises(PlanError, match=f"{where}{tmp_path} cannot be written by this user; give another folder, or"):
        plan_of_disk(pair, tmp_path / "kv")


def test_a_disk_needs_room_on_its_file_system(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there already is part of it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB - 1000))
    with pytest.raises(
        PlanError, match=r"^kv_cache\.disk\.bytes: 1\.00 GiB, but the file system of .* has only 1\.00 GiB"
    ):
        plan_of_disk(pair, tmp_path / "kv")
    plan_of_disk(pair, tmp_path / "kv", num_bytes=GIB - 1000)
    (tmp_path / "kv" / "layout").mkdir(parents=True, mode=0o700)
    (tmp_path / "kv").chmod(0o700)
    (tmp_path / "kv" / "layout" / "segment").write_bytes(bytes(1000))
    plan_of_disk(pair, tmp_path / "kv")


def test_host_memory_for_kv_counts_in_addition_to_that_of_devices(pair: tuple[Path, Path]) -> None:
    settings = replace(gpu_settings(pair, 2), device="cpu")
    make_plan(with_kv(settings, cpu_bytes=20 * GIB), cpu_nodes(8, memory_gib=40))
    with pytest.raises(PlanError, match=r"40\.00 GiB is free; lower kv_cache\.cpu_bytes or kv_cache\.device_bytes or "):
        make_plan(with_kv(settings, cpu_bytes=36 * GIB), cpu_nodes(8, memory_gib=40))
    with pytest.raises(PlanError, match=r"1\.00 GiB is free; lower kv_cache\.device_bytes or scheduler"):
        make_plan(settings, cpu_nodes(8, memory_gib=1))


def test_host_memory_of_a_machine_with_gpus_must_be_free_too(pair: tuple[Path, Path]) -> None:
    def nodes(memory_gib: int) -> Inventory:
        (node,) = gpu_nodes(3).nodes
        return Inventory(nodes=(replace(node, memory_bytes=memory_gib * GIB),), head_node_id=node.node_id)

    settings = with_kv(gpu_settings(pair, 2), cpu_bytes=8 * GIB)
    make_plan(settings, nodes(8))
    with pytest.raises(
        PlanError, match=r"they need [78]\.\d\d GiB of memory, 7\.00 GiB is free; lower kv_cache\.cpu_bytes$"
    ):
        make_plan(settings, nodes(7))


def test_a_hit_is_priced_by_the_fullest_rank_and_the_fullest_node(pair: tuple[Path, Path]) -> None:
    settings = gpu_settings(pair, 2)
    target, draft = settings.model("target").kv_bytes_per_token, settings.model("draft").kv_bytes_per_token
    assert target > draft
    bandwidths = Bandwidths(host=1e9, disk=1e8)
    for num_gpus, fullest_node in (((3,), 2 * target + draft), ((2, 1), 2 * target), ((1, 1, 1), target)):
        hit = price_hit(1000, make_plan(settings, gpu_nodes(*num_gpus)).bundles, settings, bandwidths)
        assert hit.host_bytes == hit.disk_bytes == {"target": 2 * 1000 * target, "draft": 1000 * draft}
        assert hit.host_s == pytest.approx(1000 * target / 1e9)
        assert hit.disk_s == pytest.approx(1000 * fullest_node / 1e8)
    together = gpu_settings(pair, 1, colocated=True)
    both = together.model("target").kv_bytes_per_token + draft
    hit = price_hit(1000, make_plan(together, gpu_nodes(1)).bundles, together, bandwidths)
    assert hit.host_s == pytest.approx(1000 * both / 1e9)


@pytest.mark.parametrize(
    ("tier_dtype", "host_gain", "disk_gain", "bits"),
    [("int8", 16 / 11, 16 / 11, ("8", "8")), ("int4", 16 / 11, 16 / 7, ("8", "4"))],
)
def test_rounded_tiers_hold_more_tokens_and_the_plan_says_that_they_are_not_exact(
    tier_dtype: TierDtype, host_gain: float, disk_gain: float, bits: tuple[str, str]
) -> None:
    models = Path(__file__).parents[2] / "models"
    exact = with_kv(gpu_settings((models / "demo-target", models / "demo-draft"), 1))
    rounded = replace(exact, kv_cache=replace(exact.kv_cache, tier_dtype=tier_dtype))
    plans = [make_plan(settings, gpu_nodes(2)) for settings in (exact, rounded)]
    before, after = (plan.bundles[0] for plan in plans)
    assert after.num_host_slots / before.num_host_slots == pytest.approx(host_gain, rel=0.1)
    assert after.num_disk_blocks / before.num_disk_blocks == pytest.approx(disk_gain, rel=0.1)
    hits = [
        price_hit(1024, plan.bundles, settings, Bandwidths())
        for plan, settings in zip(plans, (exact, rounded), strict=True)
    ]
    assert hits[0].host_s / hits[1].host_s == pytest.approx(host_gain, rel=0.1)
    assert hits[0].disk_s / hits[1].disk_s == pytest.approx(disk_gain, rel=0.1)
    for note, num_bits in zip(plans[1].notes[-2:], bits, strict=True):
        assert f" in {num_bits} bits (not exact: tier_dtype {tier_dtype})" in note
    (spec,) = worker_specs(rounded, plans[1].replicas[0].group("target"), 1)
    assert spec.engines[0].tiers.tier_dtype == tier_dtype


def test_a_cache_in_fp8_takes_half_the_bytes_of_a_token_of_the_target(tmp_path: Path) -> None:
    models = Path(__file__).parents[2] / "models"
    settings = {}
    for dtype in ("auto", "fp8"):
        file = tmp_path / f"{dtype}.yaml"
        file.write_text(f"""
            apiVersion: echelon/v1
            kind: Deployment
            name: rough
            target: {{model: {models / "demo-target"}}}
            draft: {{model: {models / "demo-draft"}}}
            device: cpu
            kv_cache: {{dtype: {dtype}, cpu_bytes: 256MiB}}
            """)
        settings[dtype] = load_deployment(file)
    exact, rough = (each.target.kv_bytes_per_token for each in settings.values())
    assert rough * 2 == exact
    assert settings["fp8"].model("draft").kv_bytes_per_token == settings["auto"].model("draft").kv_bytes_per_token
    slots = [make_plan(each, cpu_nodes(8)).bundles[0].num_host_slots for each in settings.values()]
    assert slots[1] == pytest.approx(slots[0] * 4 / 3, rel=0.01)
    (spec,) = worker_specs(settings["fp8"], make_plan(settings["fp8"], cpu_nodes(8)).replicas[0].group("target"), 1)
    assert spec.engines[0].kv_dtype == "fp8"


def test_the_deployment_file_gives_the_tiers_and_the_plan_says_what_they_hold(tmp_path: Path) -> None:
    models = Path(__file__).parents[2] / "models"
    file = tmp_path / "d.yaml"
    file.write_text(f"""
        apiVersion: echelon/v1
        kind: Deployment
        name: tiers
        target: {{model: {models / "demo-target"}}}
        draft: {{model: {models / "demo-draft"}}}
        device: cpu
        kv_cache: {{block_size: 16, cpu_bytes: 256MiB, disk: {{path: kv, bytes: 2GiB, read_only: true}}}}
        """)
    settings = load_deployment(file)
    plan = make_plan(settings, cpu_nodes(8))
    num_slots, num_blocks = plan.bundles[0].num_host_slots, plan.bundles[0].num_disk_blocks
    assert (num_slots * 16, num_blocks * 16) == (32_768, 261_632)
    (spec,) = worker_specs(settings, plan.replicas[0].group("draft"), 1)
    assert (spec.engines[0].tiers.disk_path, spec.engines[0].tiers.disk_read_only) == (str(tmp_path / "kv"), True)
    assert plan.notes[-2:] == (
        "host memory holds the KV of 32,768 tokens; 2,048 tokens (target 8.0 MiB, draft 8.0 MiB) come back in about "
        "0.8 ms if each rank copies 10 GB/s (assumed, not measured)",
        "the disk holds the KV of 261,632 tokens in 2.00 GiB of its 2.00 GiB; 2,048 tokens (target 8.0 MiB, "
        "draft 8.0 MiB) come back in about 17 ms if a node's disk reads 1 GB/s (assumed, not measured)",
    )
