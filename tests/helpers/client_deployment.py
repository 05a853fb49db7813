"""A deployment of the demo pair whose template knows tools and reasoning, for clients of the HTTP API."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cluster.deployment.settings import JobsSettings, KvCacheSettings, SchedulerSettings
from cluster.local import LOCAL_SERVER, LocalDeployment, LocalDraft, local_settings
from tests.helpers.demo_folders import make_folder
from tests.helpers.scrape import free_port

MODELS = Path(__file__).parents[2] / "models"
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }} <tool_call></tool_call>{% endif %}
{%- for message in messages %}
# {{ message.role }}: {{ message.content }}{{ message.tool_calls | tojson if message.tool_calls else '' }}
{%- endfor %}
# assistant: {% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"""


@contextmanager
def client_deployment(parent: Path) -> Iterator[str]:
    """Its URL. The model is called demo; `parent` gets its folder."""
    folder = parent / "demo"
    folder.mkdir()
    make_folder(folder, jinja=TEMPLATE)
    shutil.copy(MODELS / "demo-target" / "model.safetensors", folder)
    settings = local_settings(
        folder,
        draft=LocalDraft(folder=MODELS / "demo-draft"),
        dtype="float32",  # a prefix hit must not change a token
        kv_cache=KvCacheSettings(device_bytes=32 << 20),
        scheduler=SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=1024),
        server=replace(LOCAL_SERVER, http_port=free_port()),
        jobs=JobsSettings(path=str(parent / "jobs")),
    )
    with LocalDeployment(settings, gateway=True):
        yield f"http://127.0.0.1:{settings.server.http_port}"
