"""Placement: which rank goes where, and the reason when a rank has no place."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.config_json import parse_config, read_config_json
from checkpoint.memory import SAMPLING_TILE_ROWS, sampling_bytes
from cluster.deployment.deployment_file import load_deployment
from cluster.deployment.settings import (
    CpuSettings,
    DiskSettings,
    KvCacheSettings,
    ModelSettings,
    Pipeline,
    SchedulerSettings,
    Settings,
    SpeculationSettings,
)
from cluster.errors import PlanError
from cluster.local import LOCAL_SCHEDULER, LocalDraft, local_settings
from cluster.planning.inventory import visible_gpus
from cluster.planning.plan import GIB, ControlProcess, Inventory, MemoryEstimate, Node, Plan, check_followed
from cluster.planning.planner import expected_sampling_bytes, make_plan
from cluster.planning.tiers import Bandwidths, price_hit
from cluster.process_id import ProcessId
from cluster.processes.specs import scheduler_spec, worker_specs
from echelon.pb import process_pb2, worker_pb2
from tests.helpers.model_folders import write_model_folder
from workers.layers.rope import cos_sin_cache
from workers.process.load import reserved_sampling_bytes

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
    assert plan.scheduler.node_id == "node-2", "beside the target's leader"
    assert plan.gateway.node_id == "node-0", "on the head node"


def test_the_draft_goes_elsewhere_where_the_targets_node_is_full(pair: tuple[Path, Path]) -> None:
    plan = make_plan(gpu_settings(pair, 4), gpu_nodes(0, 4, 1))
    assert where(plan) == [f"target-0.{rank}@node-1" for rank in range(4)] + ["draft-0.0@node-2"]


def test_a_group_that_fits_no_node_spreads_over_few(pair: tuple[Path, Path]) -> None:
    plan = make_plan(gpu_settings(pair, 4, draft=False), gpu_nodes(1, 2, 3))
    assert [bundle.node_id for bundle in plan.bundles] == ["node-2", "node-2", "node-2", "node-1"]


def test_a_colocated_draft_takes_no_device(pair: tuple[Path, Path]) -> None:
    plan = make_plan(gpu_settings(pair, 2, colocated=True), gpu_nodes(2))
    assert [bundle.engines for bundle in plan.bundles] == [("target", "draft"), ("target",)]


def test_colocated_engines_divide_the_gpu_by_tokens(pair: tuple[Path, Path]) -> None:
    settings = gpu_settings(pair, 1, colocated=True)
    plan = make_plan(settings, gpu_nodes(1))
    (spec,) = worker_specs(settings, plan.group("target"), incarnation=1)
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


def test_a_gpu_too_small_is_no_place(pair: tuple[Path, Path]) -> None:
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


def test_every_rank_gets_cores_of_its_own(pair: tuple[Path, Path]) -> None:
    settings = replace(gpu_settings(pair, 2), device="cpu", cpu=CpuSettings(threads_per_worker=2))
    plan = make_plan(settings, cpu_nodes(8))
    assert [bundle.cpu_ids for bundle in plan.bundles] == [(0, 1), (2, 3), (4, 5)]
    assert [bundle.num_cpus for bundle in plan.bundles] == [2.0] * 3
    assert plan.notes == ()


def test_ranks_share_cores_where_there_are_too_few(pair: tuple[Path, Path]) -> None:
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


def test_nobody_is_pinned_where_others_use_the_cores(pair: tuple[Path, Path]) -> None:
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


def test_a_draft_of_a_shorter_context_is_planned_for_it(tmp_path: Path) -> None:
    target = write_model_folder(tmp_path / "target")
    short = write_model_folder(tmp_path / "draft", max_position_embeddings=96)
    settings = gpu_settings((target, short), 1)
    plan = make_plan(settings, gpu_nodes(2))
    assert settings.max_model_len == 512
    assert plan.notes == ("the draft model's own limit is 96 tokens: beyond them a seq goes on without its drafts",)
    lengths = {
        role: worker_specs(settings, plan.group(role), 1)[0].engines[0].max_model_len for role in ("target", "draft")
    }
    assert lengths == {"target": 512, "draft": 96}


def test_the_least_gpu_for_colocated_engines_holds_a_longest_seq(tmp_path: Path) -> None:
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
    (spec,) = worker_specs(settings, make_plan(settings, gpu_of(enough)).group("target"), incarnation=1)
    assert spec.engines[0].kv_cache_bytes >= settings.max_model_len * settings.target.kv_bytes_per_token


@pytest.mark.parametrize(("colocated", "num_tables"), [(False, 1), (True, 2)])
def test_the_plan_counts_the_angles_that_a_rank_holds(tmp_path: Path, colocated: bool, num_tables: int) -> None:
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


def test_wires_stay_on_a_single_machine(pair: tuple[Path, Path]) -> None:
    settings = gpu_settings(pair, 1)
    alone = make_plan(settings, gpu_nodes(2))
    assert {bundle.address for bundle in alone.bundles} == {"127.0.0.1"}
    assert alone.scheduler.address == "127.0.0.1"
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


def test_layer_parallel_ranks_get_devices_of_their_own(pair: tuple[Path, Path]) -> None:
    settings = layered(pair, 4, layer_groups=[[0], [1, 2, 3], [4, 5, 6], [7]])
    plan = make_plan(settings, gpu_nodes(2, 4))
    assert where(plan) == [f"target-0.{rank}@node-0" for rank in range(2)] + [
        f"draft-0.{rank}@node-1" for rank in range(4)
    ]
    (engine,) = worker_specs(settings, plan.group("draft"), 1)[3].engines
    assert (engine.lp_size, engine.tp_size) == (4, 1)
    assert [list(group.layers) for group in engine.layer_groups] == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert (engine.layer_parallel_weights, engine.layer_parallel_mlp) == ("replicated", "auto")


def test_layers_of_a_colocated_draft_share_a_device_where_the_target_has_fewer(pair: tuple[Path, Path]) -> None:
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
        (target,) = worker_specs(settings, plan.group("target"), 1)[0].engines
        (draft,) = worker_specs(settings, plan.group("draft"), 1)[0].engines
        return target.max_num_seqs, draft.max_num_seqs

    assert slots("continuous", 4) == (4, 16)
    assert slots("continuous", 100) == (100, 164), "64 branches at most"
    assert slots("serial", 4) == (4, 4)


def test_the_scheduler_is_told_how_to_speculate(pair: tuple[Path, Path]) -> None:
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
def test_plan_and_worker_reserve_the_same_for_choosing_tokens(
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
def test_engines_hold_equally_many_blocks_in_each_tier(
    pair: tuple[Path, Path], tp_size: int, num_gpus: list[int], options: dict[str, bool]
) -> None:
    """Of the same prefixes; and the fullest node uses what it may."""
    models = pair[::-1] if options.get("draft_is_larger") else pair
    settings = with_kv(gpu_settings(models, tp_size, colocated=options.get("colocated", False)))
    plan = make_plan(settings, gpu_nodes(*num_gpus))
    tiers = {
        engine.role: engine.tiers
        for role in ("target", "draft")
        for spec in worker_specs(settings, plan.group(role), incarnation=1)
        for engine in spec.engines
    }
    assert len(tiers) == 2
    (num_slots,) = {spec.num_host_slots for spec in tiers.values()}
    host, disk, block = Counter[str](), Counter[str](), Counter[str]()  # bytes on each node
    for bundle in plan.bundles:
        for engine in bundle.engines:
            block_bytes = settings.kv_cache.block_size * settings.model(engine).kv_bytes_per_token
            spec = tiers[worker_pb2.EngineRole.Value(f"ENGINE_ROLE_{engine.upper()}")]
            assert spec.disk_bytes == bundle.num_disk_blocks * block_bytes
            assert spec.disk_node_bytes == 4 * GIB
            block[bundle.node_id] += block_bytes
            host[bundle.node_id] += num_slots * block_bytes
            disk[bundle.node_id] += spec.disk_bytes
    for used, limit in ((host, GIB), (disk, 4 * GIB)):
        assert all(num_bytes <= limit for num_bytes in used.values())
        assert any(used[node_id] + block[node_id] > limit for node_id in used)
    assert {bundle.num_host_slots for bundle in plan.bundles} == {num_slots}
    assert len({bundle.num_disk_blocks for bundle in plan.bundles}) == 1
    assert sum(bundle.memory.host_bytes for bundle in plan.bundles) == host.total()


@pytest.mark.parametrize(
    ("sizes", "key"),
    [({"cpu_bytes": 1000}, "kv_cache.cpu_bytes"), ({"disk_bytes": 1000}, "kv_cache.disk.bytes")],
)
def test_a_tier_without_room_for_a_block_names_its_key(
    pair: tuple[Path, Path], sizes: dict[str, int], key: str
) -> None:
    settings = with_kv(gpu_settings(pair, 2), **sizes)
    with pytest.raises(PlanError, match=rf"^{key}: 1,000 bytes hold no block: .* takes [\d,]+ bytes; raise it"):
        make_plan(settings, gpu_nodes(3))


def test_host_memory_for_kv_counts_beside_what_the_node_gives_to_devices(pair: tuple[Path, Path]) -> None:
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
        assert hit.engine_bytes == {"target": 2 * 1000 * target, "draft": 1000 * draft}
        assert hit.host_s == pytest.approx(1000 * target / 1e9)
        assert hit.disk_s == pytest.approx(1000 * fullest_node / 1e8)
    together = gpu_settings(pair, 1, colocated=True)
    both = together.model("target").kv_bytes_per_token + draft
    hit = price_hit(1000, make_plan(together, gpu_nodes(1)).bundles, together, bandwidths)
    assert hit.host_s == pytest.approx(1000 * both / 1e9)


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
    assert (num_slots * 16, num_blocks * 16) == (32_768, 262_144)
    (spec,) = worker_specs(settings, plan.group("draft"), 1)
    assert (spec.engines[0].tiers.disk_path, spec.engines[0].tiers.disk_read_only) == (str(tmp_path / "kv"), True)
    assert plan.notes[-2:] == (
        "host memory holds the KV of 32,768 tokens; 2,048 tokens (target 8.0 MiB, draft 8.0 MiB) come back in about "
        "0.8 ms if each rank copies 10 GB/s (assumed, not measured)",
        "the disk holds the KV of 262,144 tokens; 2,048 tokens (target 8.0 MiB, draft 8.0 MiB) come back in about "
        "17 ms if a node's disk reads 1 GB/s (assumed, not measured)",
    )
