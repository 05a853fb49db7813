"""A scheduler core with fake engines and a clock that the test moves."""

import random
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models

from checkpoint.token_table import TokenTable
from echelon.pb import inference_pb2, sampling_pb2, scheduler_pb2, worker_pb2
from scheduler.config import Method, SchedulerConfig, SpeculationConfig
from scheduler.core import SchedulerCore
from scheduler.requests.outputs import Chunk, Completed, Failed, Output
from tests.helpers.fake_group import FakeEngine, FakeModel, plain_tokens
from tests.helpers.sampling_params import resolved_sampling

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"


def token_table(size: int = 40) -> TokenTable:
    """A table in which each token is one letter."""
    tokenizer = Tokenizer(models.BPE(vocab={_LETTERS[i]: i for i in range(size)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return TokenTable(tokenizer)


def letters(token_ids: list[int]) -> str:
    return "".join(_LETTERS[token_id] for token_id in token_ids)


def submit(
    request_id: str,
    prompt: list[int],
    *,
    timeout_s: float | None = None,
    cache_salt: str = "",
    tenant: str = "",
    is_background: bool = False,
    attention: str = "",
    **fields: Any,
) -> Any:
    """A Submit; `fields` are sampling parameters, or those of Speculation."""
    wishes = ("enabled", "num_speculative_tokens", "lower_draft")
    speculation = {name: fields.pop(name) for name in wishes if name in fields}
    return scheduler_pb2.Submit(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=resolved_sampling(**{"seed": 1, "max_tokens": 16} | fields),
        speculation=inference_pb2.Speculation(**speculation),
        timeout_s=timeout_s,
        cache_salt=cache_salt,
        tenant=tenant,
        is_background=is_background,
        attention=inference_pb2.Attention(mode=attention),
    )


def seq_sampling(message: scheduler_pb2.Submit, index: int = 0) -> sampling_pb2.SeqSampling:
    """What `plain_tokens` needs from a Submit (no EOS is configured)."""
    sampling = message.sampling
    return sampling_pb2.SeqSampling(
        seed=sampling.seed,
        sample_index=index,
        min_tokens=sampling.min_tokens,
        suppressed_token_ids=sampling.stop_token_ids,
    )


class Simulation:
    """Each engine has a queue of rounds; the test, or `run`, lets it do the next one."""

    def __init__(
        self,
        *,
        target: FakeEngine | None = None,
        draft: FakeEngine | None = None,
        k: int = 4,
        speculation: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.target = target or FakeEngine()
        self.draft = draft
        self.now = 0.0
        defaults = {
            "model_name": "fake",
            "max_num_batched_tokens": self.target.max_num_batched_tokens,
            "max_model_len": self.target.max_model_len,
            "speculation": SpeculationConfig(
                **{"method": Method.DRAFT_MODEL if draft else Method.NONE, "num_speculative_tokens": k}
                | dict(speculation or {})
            ),
        }
        self._config = SchedulerConfig(**defaults | config)
        self._connect()
        self.submitted: dict[str, scheduler_pb2.Submit] = {}
        self.target_rounds: deque[worker_pb2.Round] = deque()
        self.draft_rounds: deque[worker_pb2.Round] = deque()
        self.moves: list[tuple[FakeEngine, worker_pb2.MoveOrder, int]] = []  # and the rounds sent before
        self._num_sent = {worker_pb2.ENGINE_ROLE_TARGET: 0, worker_pb2.ENGINE_ROLE_DRAFT: 0}
        self.chunks: list[Chunk] = []
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.text: dict[tuple[str, int], str] = {}
        self.completed: dict[str, inference_pb2.GenerateComplete] = {}
        self.failed: dict[str, Failed] = {}
        self.ended_at: dict[str, float] = {}
        self.first_token_at: dict[str, float] = {}

    def _connect(self) -> None:
        """A new core takes over the engines."""
        self.core = SchedulerCore(self._config, token_table())
        self.core.connect_target(self.target.info, self.target.incarnation)
        if self.draft:
            self.core.connect_draft(self.draft.info, self.draft.incarnation)

    def lose_scheduler(self) -> None:
        """The core is lost. Another one goes on with what the clients have of their requests."""
        self.target.reset()
        self.target_rounds.clear()
        if self.draft is not None:
            self.draft.reset()
            self.draft_rounds.clear()
        self.moves.clear()
        self._num_sent = dict.fromkeys(self._num_sent, 0)
        self._connect()
        for request_id, message in self.submitted.items():
            if request_id not in self.ended_at:
                again = scheduler_pb2.Submit()
                again.CopyFrom(message)
                again.resume_from.CopyFrom(self._resume(request_id, message.sampling.n))
                refusal = self.core.add(again, self.now)
                assert refusal is None, refusal
        self.take(self.core.take_outputs())

    def _resume(self, request_id: str, num_samples: int) -> inference_pb2.Resume:
        keys = [(request_id, index) for index in range(num_samples)]
        samples = [
            inference_pb2.ResumedSample(token_ids=self.tokens.get(key, []), num_chars=len(self.text.get(key, "")))
            for key in keys
        ]
        return inference_pb2.Resume(samples=samples)

    def submit(self, message: scheduler_pb2.Submit) -> None:
        self.submitted[message.request_id] = message
        refusal = self.core.add(message, self.now)
        if refusal is not None:
            self.take([refusal])

    def cancel(self, request_id: str) -> None:
        self.core.cancel(request_id, self.now)
        self.take(self.core.take_outputs())

    def expire(self) -> None:
        self.core.expire(self.now)
        self.take(self.core.take_outputs())

    def disconnect_target(self, reason: str, *, has_died: bool = True) -> None:
        self.core.disconnect_target(reason, self.now, has_died=has_died)
        self.take(self.core.take_outputs())

    def lose_target(self, *, has_died: bool = True) -> None:
        """The target engine is lost with everything in flight."""
        self.disconnect_target("target group: it died", has_died=has_died)
        self.target_rounds.clear()
        self.moves = [move for move in self.moves if move[0] is not self.target]
        self._num_sent[self.target.role] = 0
        self.target.reset()

    def return_target(self) -> None:
        """It comes back empty, as the next incarnation."""
        self.target.incarnation += 1
        self.core.connect_target(self.target.info, self.target.incarnation)

    def reconnect_draft(self) -> None:
        """The draft engine is lost with everything in flight, and comes back empty."""
        assert self.draft is not None, "there is no draft engine to lose"
        self.core.disconnect_draft()
        self.draft_rounds.clear()
        self.moves = [move for move in self.moves if move[0] is not self.draft]
        self._num_sent[self.draft.role] = 0
        self.draft.reset()
        self.core.connect_draft(self.draft.info, self.draft.incarnation)

    def plan(self) -> None:
        """Sends every round that the core wants to send."""
        while True:
            self._order_moves()
            draft, target = self.core.plan_draft(self.now), self.core.plan_target(self.now)
            self._order_moves()
            if draft is not None:
                assert self.draft is not None
                self.draft.receive(draft)
                self.draft_rounds.append(draft)
                self._num_sent[worker_pb2.ENGINE_ROLE_DRAFT] += 1
            if target is not None:
                self.target.receive(target)
                self.target_rounds.append(target)
                self._num_sent[worker_pb2.ENGINE_ROLE_TARGET] += 1
            if draft is None and target is None:
                return

    @property
    def is_awaited(self) -> bool:
        """Whether something is on its way that lets it plan again, or nothing is left to do."""
        in_flight = self.draft_rounds or self.target_rounds or self.moves
        return bool(in_flight) or self.core.next_release() is not None or self.core.num_requests == 0

    def _order_moves(self) -> None:
        for role, order in self.core.order_moves(self.now):
            engine = self.target if role == worker_pb2.ENGINE_ROLE_TARGET else self.draft
            assert engine is not None
            engine.order(order)
            self.moves.append((engine, order, self._num_sent[role]))

    def ready_moves(self) -> list[int]:
        """Moves that may run now: of stores and loads those whose turn has come."""
        waiting = {
            worker_pb2.ENGINE_ROLE_TARGET: len(self.target_rounds),
            worker_pb2.ENGINE_ROLE_DRAFT: len(self.draft_rounds),
        }
        return [
            index
            for index, (engine, order, num_before) in enumerate(self.moves)
            if not order.block_ids or num_before <= self._num_sent[engine.role] - waiting[engine.role]
        ]

    def run_move(self, index: int, fails: Collection[int] = (), error: str = "") -> None:
        engine, order, _ = self.moves.pop(index)
        self.core.tiers_of(engine.role).on_moved(engine.move(order, fails, error), self.now)

    def run_target_round(self) -> worker_pb2.RoundResult:
        result = self.target.run(self.target_rounds.popleft())
        self.core.on_target_result(result, self.now)
        self.take(self.core.take_outputs())
        return result

    def run_draft_round(self) -> None:
        assert self.draft is not None
        message = self.draft_rounds.popleft()
        self.draft.overtake(message, self.draft_rounds)
        self.core.on_draft_result(self.draft.run(message), self.now)

    def step(self, rng: random.Random | None = None) -> bool:
        """Lets one engine do one round; False if there is none to do."""
        self.plan()
        moves = self.ready_moves()
        ready = [queue for queue in (self.draft_rounds, self.target_rounds, moves) if queue]
        if not ready:
            return self._wait_for_release()
        chosen = rng.choice(ready) if rng else ready[0]
        if chosen is moves:
            self.run_move(rng.choice(moves) if rng else moves[0])
        elif chosen is self.draft_rounds:
            self.run_draft_round()
        else:
            self.run_target_round()
        return True

    def _wait_for_release(self) -> bool:
        """Nothing runs: lets time pass until a held seq has waited long enough."""
        release = self.core.next_release()
        if release is None:
            return False
        assert release > self.now, "a seq is held although its time is up"
        self.now = release
        return True

    def run(self, rng: random.Random | None = None) -> None:
        while self.step(rng):
            pass
        assert self.core.num_requests == 0, f"stuck with {self.core.num_requests} requests"

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            request_id = output.request_id
            assert request_id not in self.ended_at or isinstance(output, Failed), f"{request_id} went on after its end"
            match output:
                case Chunk():
                    self._take_chunk(output)
                case Completed():
                    self.completed[request_id] = output.message
                    self.ended_at[request_id] = self.now
                case Failed():
                    self.failed[request_id] = output
                    self.ended_at[request_id] = self.now

    def _take_chunk(self, chunk: Chunk) -> None:
        key = (chunk.request_id, chunk.index)
        tokens = self.tokens.setdefault(key, [])
        assert chunk.offset == len(tokens), "chunks follow each other without gap or overlap"
        self.chunks.append(chunk)
        tokens += chunk.token_ids
        self.text[key] = self.text.get(key, "") + chunk.text
        self.first_token_at.setdefault(chunk.request_id, self.now)

    def assert_all_free(self) -> None:
        """Asserts that no request holds anything on either engine."""
        status = self.core.status()
        assert status.num_free_blocks == status.num_blocks
        assert status.num_free_draft_blocks == status.num_draft_blocks

    def assert_plain(self, message: scheduler_pb2.Submit, index: int = 0) -> None:
        """Asserts that the sample's tokens are those of plain decoding, up to its end."""
        tokens = self.tokens.get((message.request_id, index), [])
        expected = plain_tokens(list(message.prompt_token_ids), seq_sampling(message, index), len(tokens), FakeModel())
        assert tokens == expected
