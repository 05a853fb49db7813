"""KV that leaves the devices comes back from host memory and disk, and nobody's tokens change: whole deployments, with
processes and files, through the gateway. What a request should say is computed beside it, under a salt that nobody else
has, so that nothing of it was known before.

Devices, host memory and disk are so small that a few prompts push everything out of each. The tests run in the order in
which they stand here. Those that damage a disk come last, because it is then left alone until the next start.
"""

import contextlib
import inspect
import itertools
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from checkpoint.folder import read_model_folder
from childproc.wires import open_blocking_channel
from cluster.deployment.settings import DiskSettings, KvCacheSettings, SchedulerSettings, Settings, SpeculationSettings
from cluster.local import LocalDeployment, LocalDraft, local_settings
from cluster.processes.child import Child
from cluster.processes.startup import Launch
from echelon import Client
from echelon.pb import scheduler_pb2, scheduler_pb2_grpc, worker_pb2
from echelon.pb.process_pb2 import SchedulerSpec
from echelon.results import Completion

MODELS = Path(__file__).parents[2] / "models"
TARGET, DRAFT = MODELS / "demo-target", MODELS / "demo-draft"
BLOCK = 8
NUM_BLOCKS = 48  # on each device
NUM_SLOTS = 144  # host memory, of each engine
NUM_DISK_BLOCKS = 480  # of each engine
MAX_LEN = NUM_BLOCKS * BLOCK
PREFIX = 200
KNOWN = (PREFIX - 1) // BLOCK * BLOCK  # what need not be computed of a prompt that was asked before
MOST_OF_IT = KNOWN - BLOCK  # a block may have stayed on the device
NUM_TOKENS = 16
NUM_DRAFTS = 3
TIMEOUT_S = 60.0  # for what happens soon, on a busy machine too
TRIES = 5  # for what this deployment does unless the machine is too busy

TARGET_ROLE, DRAFT_ROLE = worker_pb2.ENGINE_ROLE_TARGET, worker_pb2.ENGINE_ROLE_DRAFT

Prompt = list[int]
Role = "worker_pb2.EngineRole.ValueType"


class Texts:
    """Passages of Python code, no two of which begin alike."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
        self._code = self.tokenizer.encode(inspect.getsource(inspect)).ids
        self._numbers = itertools.count(1)

    def encode(self, text: str) -> Prompt:
        return list(self.tokenizer.encode(text).ids)

    def new(self, num_tokens: int = PREFIX, first: str = "") -> Prompt:
        number = next(self._numbers)
        start = 37 * number % (len(self._code) - MAX_LEN)
        return [*self.encode(first or f"# Part {number}\n"), *self._code[start:]][:num_tokens]


class FetchingDeployment(LocalDeployment):
    """One that fetches whatever is there: models this small are sometimes computed faster on a busy machine."""

    def spawn(self, launch: Launch) -> Child:
        if isinstance(launch.spec, SchedulerSpec):
            launch.spec.tiers.ignores_prices = True
        return super().spawn(launch)


class House:
    """A deployment that can be stopped and started again over the same disk."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.texts = Texts()
        self._salts = itertools.count()
        self._running = ExitStack()

    @property
    def disk(self) -> DiskSettings:
        assert self.settings.kv_cache.disk is not None
        return self.settings.kv_cache.disk

    @property
    def rank_folders(self) -> list[Path]:
        """In which each rank keeps its blocks, those of the target first."""
        return sorted(Path(self.disk.path).glob("*/*-rank*"), key=lambda path: (path.name[0] == "d", path.name))

    def start(self) -> None:
        deployment = FetchingDeployment(self.settings, gateway=True)
        self._deployment = self._running.enter_context(deployment)
        self.client = self._running.enter_context(Client(deployment.running.gateway_address))
        channel = self._running.enter_context(open_blocking_channel(deployment.running.replicas[0].scheduler_address))
        self._scheduler = scheduler_pb2_grpc.SchedulerStub(channel)

    def stop(self) -> None:
        self._running.close()

    def ask(
        self, prompt: Prompt, *, drafts: int, num_tokens: int = NUM_TOKENS, salt: str = "", **others: Any
    ) -> Completion:
        return self.client.generate(prompt, **options(drafts, num_tokens, cache_salt=salt, **others))

    def ask_cold(self, prompt: Prompt, *, drafts: int = 0, num_tokens: int = NUM_TOKENS) -> Completion:
        """As if nobody had asked anything before."""
        done = self.ask(prompt, drafts=drafts, num_tokens=num_tokens, salt=f"cold {next(self._salts)}")
        assert done.usage.cached_prompt_tokens == 0
        return done

    def ask_and_keep(self, prompt: Prompt, *, drafts: int, num_tokens: int = NUM_TOKENS) -> Completion:
        """Ask what is new, and wait until host memory has all its blocks.

        On a busy machine a request can end before the draft has read all of its prompt. So it is asked again.
        """
        roles = (TARGET_ROLE, DRAFT_ROLE) if drafts else (TARGET_ROLE,)
        expected = {role: self.tier("host", role).stored_blocks_total + len(prompt) // BLOCK for role in roles}
        done = self.ask(prompt, drafts=drafts, num_tokens=num_tokens)
        for _ in range(TRIES):
            if is_soon(lambda: all(self.tier("host", role).stored_blocks_total >= n for role, n in expected.items())):
                return done
            self.ask(prompt, drafts=drafts, num_tokens=num_tokens)
        raise AssertionError(f"host memory lacks blocks of the prompt after {1 + TRIES} times")

    def leave_device(self) -> None:
        """Other prompts push everything out of the devices."""
        for _ in range(-(-self.status().num_blocks // NUM_BLOCKS)):
            self.ask(self.texts.new(MAX_LEN - 4), drafts=NUM_DRAFTS, num_tokens=4)

    def leave_host_memory(self) -> None:
        """Other prompts push everything out of host memory. It is on disk."""
        for _ in range(-(-NUM_SLOTS * BLOCK // 300) + 1):
            self.ask_and_keep(self.texts.new(300), drafts=NUM_DRAFTS, num_tokens=8)

    def status(self) -> scheduler_pb2.SchedulerStatus:
        return self._scheduler.GetSchedulerStatus(scheduler_pb2.GetSchedulerStatusRequest())

    def tier(self, name: str, role: Any = TARGET_ROLE) -> scheduler_pb2.TierStatus:
        return next(tier for tier in self.status().tiers if (tier.tier, tier.engine) == (name, role))

    def pid(self, process: str) -> int:
        pid = self._deployment.processes.read(lambda board: board.process(process).pid)
        assert pid is not None
        return pid


def options(drafts: int, num_tokens: int, **others: Any) -> dict[str, Any]:
    speculation = {"num_speculative_tokens": drafts} if drafts else {"enabled": False}
    return {
        "temperature": 0.0,
        "max_tokens": num_tokens,
        "timeout_s": TIMEOUT_S,
        "ignore_eos": True,
        "speculation": speculation,
        **others,
    }


def wait_until(condition: Callable[[], bool]) -> None:
    assert is_soon(condition, TIMEOUT_S), f"not within {TIMEOUT_S} s"


def is_soon(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)  # polls another process: there is nothing to wait on
    return True


def settings_of(disk: Path, *, tp_size: int, layer_parallel_size: int) -> Settings:
    plain = local_settings(
        TARGET,
        tp_size=tp_size,
        draft=LocalDraft(folder=DRAFT, layer_parallel_size=layer_parallel_size),
        dtype="float32",
        scheduler=SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=MAX_LEN),
        speculation=SpeculationSettings(pipeline="serial", num_speculative_tokens=NUM_DRAFTS),
    )
    assert plain.draft is not None
    models = (plain.target, plain.draft)
    block_bytes = BLOCK * sum(model.kv_bytes_per_token * model.num_ranks for model in models)
    return replace(
        plain,
        kv_cache=KvCacheSettings(
            block_size=BLOCK,
            device_bytes=NUM_BLOCKS * BLOCK * max(model.kv_bytes_per_token for model in models),
            cpu_bytes=NUM_SLOTS * block_bytes,
            disk=DiskSettings(path=str(disk), bytes=NUM_DISK_BLOCKS * block_bytes, write="all"),
        ),
    )


LAYOUTS = {
    "one rank each": {"tp_size": 1, "layer_parallel_size": 1},
    "two ranks each": {"tp_size": 2, "layer_parallel_size": 2},
}


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(settings_of(tmp_path_factory.mktemp("kv"), **request.param))
    house.start()
    yield house
    house.stop()


speculation = pytest.mark.parametrize("drafts", [0, NUM_DRAFTS], ids=["plain", "speculative"])


@speculation
@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_fetched_prefix_gives_the_same_tokens_and_drafts_as_a_computed_one(
    house: House, place: str, drafts: int
) -> None:
    """With speculation as much comes back as without, and the draft's half with it: so each of its drafts fares as it
    did when everything was computed. On a busy machine the target may go on before the draft has its half. Then another
    prompt is tried: the tries push this one further down."""
    for _ in range(TRIES):
        prompt = house.texts.new()
        house.ask_and_keep(prompt, drafts=drafts)
        house.leave_device() if place == "host" else house.leave_host_memory()
        loaded = house.tier("host", DRAFT_ROLE).fetched_blocks_total
        again = house.ask(prompt, drafts=drafts)
        num_loaded = house.tier("host", DRAFT_ROLE).fetched_blocks_total - loaded
        cold = house.ask_cold(prompt, drafts=drafts)
        assert again.token_ids == cold.token_ids
        usage = again.usage
        num_back = usage.cached_prompt_tokens_from_host if place == "host" else usage.cached_prompt_tokens_from_disk
        draft_is_back = num_loaded >= MOST_OF_IT // BLOCK if drafts else True
        if num_back >= MOST_OF_IT and draft_is_back and again.speculation == cold.speculation:
            break
    assert usage.cached_prompt_tokens == KNOWN
    assert num_back >= MOST_OF_IT
    assert draft_is_back
    assert again.speculation == cold.speculation
    if drafts:
        assert again.speculation.num_accepted_tokens > 0


@speculation
def test_a_generation_that_ends_at_a_block_boundary_keeps_only_what_was_computed(house: House, drafts: int) -> None:
    """The last token has no KV, unless it was a draft that was verified."""
    prompt = house.texts.new(PREFIX - NUM_TOKENS)
    first = house.ask_and_keep(prompt, drafts=drafts)
    house.leave_device()
    longer = [*prompt, *first.token_ids, *house.texts.encode("\n    return")]
    again = house.ask(longer, drafts=drafts)
    assert again.usage.cached_prompt_tokens in ((PREFIX - BLOCK, PREFIX) if drafts else (PREFIX - BLOCK,))
    assert again.token_ids == house.ask_cold(longer).token_ids


@pytest.mark.slow
@speculation
def test_conversations_that_evict_each_other_stay_apart(house: House, drafts: int) -> None:
    num_talks, num_turns = 6, 3
    canaries = [f"canary_{random.Random(f'{number} {drafts}').randrange(10**6)}" for number in range(num_talks)]
    before = house.tier("host").fetched_blocks_total
    asked: list[tuple[int, Prompt, tuple[int, ...]]] = []

    def talk(number: int) -> None:
        history = house.texts.new(100, first=f"{canaries[number]} = {number}\n")
        for _ in range(num_turns):
            done = house.ask(history, drafts=drafts)
            asked.append((number, history, done.token_ids))
            history = [*history, *done.token_ids, *house.texts.new(20, first=f"\nprint({canaries[number]})\n")]

    with ThreadPoolExecutor(num_talks) as pool:
        list(pool.map(talk, range(num_talks)))
    assert house.tier("host").fetched_blocks_total > before
    with ThreadPoolExecutor(num_talks) as pool:
        cold = list(pool.map(lambda each: house.ask_cold(each[1]).token_ids, asked))
    for (number, _, token_ids), expected in zip(asked, cold, strict=True):
        assert token_ids == expected
        text = house.texts.tokenizer.decode(list(token_ids))
        assert not [canary for canary in canaries if canary in text and canary != canaries[number]]


@pytest.mark.slow
@speculation
def test_preempted_seqs_come_back_from_host_memory(house: House, drafts: int) -> None:
    num_seqs, num_tokens = 4, 160
    preempted, fetched = house.status().num_preemptions_total, house.tier("host").fetched_blocks_total
    prompts = [house.texts.new(house.status().num_blocks * BLOCK // num_seqs - 30) for _ in range(num_seqs)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        ends = list(pool.map(lambda prompt: house.ask(prompt, drafts=drafts, num_tokens=num_tokens), prompts))
    assert house.status().num_preemptions_total > preempted
    assert house.tier("host").fetched_blocks_total > fetched
    for prompt, end in zip(prompts, ends, strict=True):
        assert end.token_ids == house.ask_cold(prompt, num_tokens=num_tokens).token_ids


@pytest.mark.slow
def test_aborts_at_random_moments_leave_nothing_behind(house: House) -> None:
    prompts = [house.texts.new(80 + 24 * number) for number in range(8)]

    def abort_some(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            drafts, prompt = rng.choice([0, NUM_DRAFTS]), rng.choice(prompts)
            with house.client.stream(prompt, **options(drafts, NUM_TOKENS)) as stream:
                for _ in range(rng.choice([0, 0, 1, 3, NUM_TOKENS - 1])):
                    next(stream, None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(abort_some, range(8)))
    wait_until(lambda: not house.status().num_requests_running + house.status().num_requests_waiting)
    # Every block of the devices can be used by one seq ...
    longest = house.texts.new(MAX_LEN - 1)
    house.ask_and_keep(longest, drafts=NUM_DRAFTS, num_tokens=1)
    wait_until(lambda: house.status().num_free_blocks == house.status().num_blocks)
    wait_until(lambda: house.status().num_free_draft_blocks == house.status().num_draft_blocks)
    # ... and every slot of host memory that is not kept free: prompts that fill nearly all of it come back.
    prompts = [house.texts.new(MAX_LEN - 8) for _ in range(NUM_SLOTS // NUM_BLOCKS - 1)]
    for prompt in prompts:
        house.ask_and_keep(prompt, drafts=NUM_DRAFTS, num_tokens=4)
    num_back = sum(
        house.ask(prompt, drafts=NUM_DRAFTS, num_tokens=4).usage.cached_prompt_tokens_from_disk for prompt in prompts
    )
    assert num_back == 0


@pytest.mark.slow
def test_a_disk_holds_no_more_than_its_limit(house: House) -> None:
    """Whatever is written: three times as much as there is room for."""
    capacity = house.tier("disk").num_blocks
    while house.tier("disk").stored_blocks_total < 3 * capacity:
        house.ask_and_keep(house.texts.new(MAX_LEN - 4), drafts=NUM_DRAFTS, num_tokens=4)
        assert bytes_on_disk(house) <= house.disk.bytes + sum(largest_file(folder) for folder in house.rank_folders)
    assert house.tier("disk").evicted_blocks_total > 0
    assert house.tier("disk").num_used_blocks <= capacity


def bytes_on_disk(house: House) -> int:
    return sum(segment_bytes(path) for path in Path(house.disk.path).rglob("*"))


def largest_file(folder: Path) -> int:
    return max(map(segment_bytes, folder.iterdir()))


def segment_bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.suffix in (".seg", ".tmp") else 0
    except FileNotFoundError:  # it has just been evicted or sealed
        return 0


@pytest.mark.slow
@speculation
def test_a_disk_that_fills_up_on_one_rank_slows_nobody_down(house: House, drafts: int) -> None:
    """A rank's files may not grow any more, so what it writes fails as on a full disk."""
    pid = house.pid(f"target-0.{house.settings.target.num_ranks - 1}")
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (BLOCK, unlimited[1]))
    try:
        while not house.tier("disk").paused:
            house.ask_and_keep(house.texts.new(), drafts=drafts)
        tier = house.tier("disk")
        assert "too large" in tier.last_error
        assert tier.failed_blocks_total > 0
        prompt = house.texts.new()
        cold = house.ask_cold(prompt)
        house.ask_and_keep(prompt, drafts=drafts)
        house.leave_device()
        again = house.ask(prompt, drafts=drafts)
        assert again.usage.cached_prompt_tokens_from_host > 0
        assert again.token_ids == cold.token_ids
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.slow
def test_a_full_file_system_costs_nobody_a_token(house: House) -> None:
    """A real one, of fixed size: half-way through a load there is no space left on it."""
    house.stop()
    with file_system(Path(house.disk.path), house.disk.bytes + (4 << 20)):
        house.start()
        house.ask_and_keep(house.texts.new(), drafts=NUM_DRAFTS)
        wait_until(lambda: house.tier("disk").stored_blocks_total > 0)
        fill_up(Path(house.disk.path) / "ballast")
        asked: list[tuple[Prompt, tuple[int, ...]]] = []
        while not house.tier("disk").paused:
            prompt = house.texts.new(MAX_LEN - NUM_TOKENS)
            asked.append((prompt, house.ask_and_keep(prompt, drafts=NUM_DRAFTS).token_ids))
        assert "No space left on device" in house.tier("disk").last_error
        for prompt, token_ids in asked:
            assert house.ask(prompt, drafts=NUM_DRAFTS).token_ids == token_ids == house.ask_cold(prompt).token_ids
        house.stop()
    house.start()


@contextmanager
def file_system(folder: Path, num_bytes: int) -> Iterator[None]:
    """An empty one over this folder."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},mode=700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"this user mounts no file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_up(file: Path) -> None:
    """Take all that is left of its file system."""
    with file.open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(1 << 16))


@pytest.mark.slow
def test_blocks_of_another_configuration_are_never_found(tmp_path: Path) -> None:
    """On the same disk. Those of the first one are found again afterwards."""
    house = House(settings_of(tmp_path / "kv", tp_size=1, layer_parallel_size=1))
    prompt = house.texts.new()
    house.start()
    house.ask_and_keep(prompt, drafts=NUM_DRAFTS)
    house.stop()
    for change in ("weights", "dtype", "block size"):
        other = House(changed(house.settings, change, tmp_path))
        other.start()
        assert other.tier("disk").num_used_blocks == 0
        assert other.ask(prompt, drafts=NUM_DRAFTS).usage.cached_prompt_tokens == 0
        other.stop()
    house.start()
    assert house.ask(prompt, drafts=NUM_DRAFTS).usage.cached_prompt_tokens_from_disk == KNOWN
    house.stop()


def changed(settings: Settings, change: str, folder: Path) -> Settings:
    assert settings.draft is not None
    if change == "block size":
        return replace(settings, kv_cache=replace(settings.kv_cache, block_size=2 * BLOCK))
    if change == "dtype":
        models = [
            replace(model, folder=read_model_folder(model.folder.path, dtype="bfloat16"))
            for model in (settings.target, settings.draft)
        ]
        return replace(settings, target=models[0], draft=models[1])
    weights = shutil.copytree(settings.target.folder.path, folder / TARGET.name) / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))  # the last bit of one weight
    target = replace(settings.target, folder=read_model_folder(folder / TARGET.name, dtype="float32"))
    return replace(settings, target=target)


def test_what_comes_back_from_rounded_tiers_is_labelled_and_close(tmp_path: Path) -> None:
    """int4: eight bits in host memory, four on disk, and the draft's half too. Probabilities after the prompt
    that was computed and after the one that came back differ little."""
    settings = settings_of(tmp_path, tp_size=1, layer_parallel_size=1)
    rounded = replace(settings.kv_cache, tier_dtype="int4", block_size=2 * BLOCK)
    house = House(replace(settings, kv_cache=rounded))
    house.start()
    prompt = house.texts.new()
    known = (PREFIX - 1) // (2 * BLOCK) * 2 * BLOCK
    cold = house.ask(prompt, drafts=NUM_DRAFTS, logprobs=1)
    assert cold.usage.approximations == ()
    assert house.ask_cold(prompt).token_ids == cold.token_ids
    sizes = [house.tier(name).block_bytes for name in ("host", "disk")]
    exact = 2 * BLOCK * settings.target.kv_bytes_per_token
    assert sizes == [exact * 11 // 32, exact * 7 // 32]
    for place in ("host", "disk"):
        if place == "disk":
            wait_until(lambda: house.tier("disk").stored_blocks_total == house.tier("host").stored_blocks_total)
            house.stop()
            house.start()
        else:
            wait_until(lambda: house.tier("host").stored_blocks_total >= known // (2 * BLOCK))
            house.leave_device()
        again = house.ask(prompt, drafts=NUM_DRAFTS, logprobs=1)
        usage = again.usage
        assert (usage.cached_prompt_tokens_from_host, usage.cached_prompt_tokens_from_disk)[
            place == "disk"
        ] > known // 2
        assert usage.approximations == ("kv_cache.tier_dtype: int4",)
        first, computed = (done.samples[0].logprobs[0].chosen.logprob for done in (again, cold))
        assert first != computed
        assert abs(first - computed) < 0.5
    house.stop()


def test_a_cache_in_fp8_is_labelled_and_its_blocks_come_back_bit_for_bit(tmp_path: Path) -> None:
    """Two ranks. Drafts change nothing, and neither does a prefix that comes from host memory. It gets there only when
    the devices have no room for it."""
    settings = settings_of(tmp_path, tp_size=2, layer_parallel_size=1)
    target = replace(settings.target, kv_dtype="fp8")
    cache = replace(settings.kv_cache, dtype="fp8", cpu_bytes=4 * settings.kv_cache.cpu_bytes, store="on_evict")
    house = House(replace(settings, target=target, kv_cache=cache))
    house.start()
    assert house.tier("host").block_bytes * 4 == BLOCK * settings.target.kv_bytes_per_token
    prompt = house.texts.new()
    first = house.ask(prompt, drafts=NUM_DRAFTS)
    assert house.tier("host").stored_blocks_total == 0
    house.leave_device()
    again = house.ask(prompt, drafts=NUM_DRAFTS)
    assert again.usage.cached_prompt_tokens_from_host > KNOWN // 2
    assert first.usage.approximations == again.usage.approximations == ("kv_cache.dtype: fp8",)
    assert first.token_ids == again.token_ids == house.ask_cold(prompt).token_ids
    house.stop()
    assert cache.disk is not None
    (layout,) = {folder.parent for folder in Path(cache.disk.path).glob("*/target-rank*of2")}
    assert len(list(layout.iterdir())) == 2, "both ranks have one layout, though each has scales of its own"


@pytest.mark.slow
def test_host_memory_takes_what_it_may_and_nothing_more(tmp_path: Path) -> None:
    """Resident pages of all workers, shared ones too, after blocks went both ways."""
    cpu_bytes = 256 << 20
    resident = {}
    for given in (0, cpu_bytes):
        settings = settings_of(tmp_path, tp_size=1, layer_parallel_size=1)
        house = House(replace(settings, kv_cache=replace(settings.kv_cache, cpu_bytes=given, disk=None)))
        house.start()
        prompt = house.texts.new()
        for _ in range(2):
            house.ask(prompt, drafts=NUM_DRAFTS)
            house.leave_device()
        fetched = sum(tier.fetched_blocks_total for tier in house.status().tiers)
        assert bool(fetched) is bool(given)
        resident[given] = sum(resident_bytes(house.pid(name)) for name in ("target-0.0", "draft-0.0"))
        house.stop()
    assert 0.98 * cpu_bytes < resident[cpu_bytes] - resident[0] < cpu_bytes + (16 << 20)


def resident_bytes(pid: int) -> int:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


@pytest.mark.slow
def test_a_restart_finds_the_disk_and_damage_costs_only_the_damaged_blocks(house: House) -> None:
    """Files of one rank of each engine are cut, deleted, or have one wrong bit. Two requests ask for each prefix, so
    that one of them waits for what the other one reads."""
    damaged = [house.texts.new() for _ in range(6)]
    whole = house.texts.new(PREFIX)
    cold = {tuple(prompt): house.ask_cold(prompt).token_ids for prompt in (*damaged, whole)}
    house.stop()  # the last test has left a disk that is not used
    house.start()
    for prompt in damaged:
        house.ask_and_keep(prompt, drafts=NUM_DRAFTS)
    house.leave_host_memory()
    house.ask_and_keep(whole, drafts=NUM_DRAFTS)
    house.stop()
    for folder in (house.rank_folders[house.settings.target.num_ranks - 1], house.rank_folders[-1]):
        damage(folder)
    house.start()
    first = house.ask(whole, drafts=NUM_DRAFTS)
    assert first.usage.cached_prompt_tokens_from_disk == KNOWN
    assert first.token_ids == cold[tuple(whole)]
    with ThreadPoolExecutor(2 * len(damaged)) as pool:
        for prompt, done in zip(
            2 * damaged, pool.map(lambda prompt: house.ask(prompt, drafts=NUM_DRAFTS), 2 * damaged), strict=True
        ):
            assert done.token_ids == cold[tuple(prompt)]
    num_failed = house.tier("disk").failed_blocks_total
    assert num_failed > 0
    house.leave_host_memory()
    for prompt in damaged:
        assert house.ask(prompt, drafts=NUM_DRAFTS).token_ids == cold[tuple(prompt)]
    assert house.tier("disk").failed_blocks_total == num_failed, "a bad block is tried once"


def damage(folder: Path) -> None:
    """All segments but the newest few, each in one of three ways."""
    segments = sorted(path for path in folder.iterdir() if path.suffix == ".seg")
    for number, path in enumerate(segments[:-4]):
        match number % 3:
            case 0:
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 2)
            case 1:
                path.unlink()
            case _:
                with path.open("r+b") as file:
                    file.seek(path.stat().st_size // 2)
                    (byte,) = file.read(1)
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([byte ^ 1]))


@pytest.mark.slow
def test_a_hanging_disk_delays_only_requests_that_wait_for_it(house: House) -> None:
    """Whoever opens a segment file waits for ever. A request that needs its blocks computes them instead."""
    house.stop()
    house.start()  # so that every block that is stored from now on is written too
    prompt, other = house.texts.new(), house.texts.new(40)
    cold = house.ask_cold(prompt)
    house.ask_and_keep(prompt, drafts=NUM_DRAFTS)
    house.leave_host_memory()
    wait_until(lambda: house.tier("disk").stored_blocks_total == house.tier("host").stored_blocks_total)
    for path in [path for folder in house.rank_folders for path in folder.glob("*.seg")]:
        path.unlink()
        os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(house.ask, prompt, drafts=NUM_DRAFTS)
        while not stuck.done():
            assert (
                house.ask(other, drafts=NUM_DRAFTS, num_tokens=4).timings.total_s
                < house.settings.kv_cache.load_timeout_s
            )
    done = stuck.result()
    assert done.token_ids == cold.token_ids
    assert house.settings.kv_cache.load_timeout_s <= done.timings.first_token_s
    assert "no answer within" in house.tier("disk").last_error
