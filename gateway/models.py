"""The models that replicas serve: one, or two while a deployment changes from one to another.

Each has its own tokenizer, template and limits, so a request is read for one of them and stays with its replicas.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from echelon.pb.inference_pb2 import ModelInfo
from echelon.pb.process_pb2 import GatewayModel, GatewaySpec
from echelon.pb.reading_pb2 import Reading
from gateway.requests.forms import Form
from gateway.requests.reading import RequestReader
from gateway.requests.validation import RequestValidator, build_validator

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Model:
    reader: RequestReader
    info: ModelInfo
    num_reads: int = 0  # under way


class Models:
    """New requests are read for the current one: that of the newest replica that has ever been ready."""

    def __init__(self, spec: GatewaySpec) -> None:
        """Raises LoadError naming what is wrong in the model's folder."""
        self._spec = spec
        self.current_id = spec.model_id
        self._models = {spec.model_id: _model(spec, build_validator(spec))}
        self._served: frozenset[str] = frozenset(self._models)  # by some replica
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> ModelInfo:
        return self._models[self.current_id].info

    @property
    def name(self) -> str:
        """Of the current one, as clients see it."""
        return self.info.model

    async def read(self, form: Form, data: bytes) -> Reading:
        """What a request asks of the current model. Raises Refusal."""
        model = self._models[self.current_id]
        model.num_reads += 1
        try:
            return await model.reader.read(form, data)
        finally:
            model.num_reads -= 1
            self._forget_unserved()

    def open(self) -> None:
        """Start the processes that read requests; without this, the first request does."""
        self._models[self.current_id].reader.open()

    async def close(self) -> None:
        for loading in self._loading.values():
            loading.cancel()
        await asyncio.gather(*self._loading.values(), *self._closing, return_exceptions=True)
        await asyncio.gather(*(model.reader.close() for model in self._models.values()))

    def learn(self, model: GatewayModel, on_loaded: Callable[[], None]) -> None:
        """There is a replica of this model. `on_loaded` is called once requests can be read for it."""
        if model.model_id not in self._models and model.model_id not in self._loading:
            self._loading[model.model_id] = asyncio.create_task(self._load(model, on_loaded))

    async def _load(self, model: GatewayModel, on_loaded: Callable[[], None]) -> None:
        spec = GatewaySpec()
        spec.CopyFrom(self._spec)
        spec.model_id, spec.model_name, spec.model_dir = model.model_id, model.model_name, model.model_dir
        spec.max_model_len, spec.vocab_size = model.max_model_len, model.vocab_size
        try:
            loaded = _model(spec, await asyncio.to_thread(build_validator, spec))
        except Exception:  # the edge of the task: the controller gives the change up when it does not see it used
            logger.exception("requests cannot be read for %s in %s", model.model_name, model.model_dir)
        else:
            loaded.reader.open()
            self._models[model.model_id] = loaded
            on_loaded()
        finally:
            del self._loading[model.model_id]

    def choose(self, of_replicas: Sequence[str], of_ready: Sequence[str]) -> None:
        """Take the newest that can be used as the current one, and forget those that no replica serves any more.

        `of_replicas`: the models of the replicas, the newest last; `of_ready`: of those that have ever been ready.
        """
        usable = [model_id for model_id in of_ready if model_id in self._models]
        if usable:
            self.current_id = usable[-1]
        self._served = frozenset(of_replicas)
        self._forget_unserved()

    def _forget_unserved(self) -> None:
        """But for those that requests are read for."""
        for model_id in self._models.keys() - self._served - {self.current_id}:
            if not self._models[model_id].num_reads:
                closing = asyncio.create_task(self._models.pop(model_id).reader.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)


def _model(spec: GatewaySpec, validator: RequestValidator) -> _Model:
    info = ModelInfo(
        model=spec.model_name,
        max_model_len=spec.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=validator.tokenizer.eos_token_ids(spec.vocab_size),
        has_chat_template=validator.tokenizer.chat_template is not None,
    )
    return _Model(RequestReader(spec, validator), info)
