"""`python -m tests.clients.load BIN`: runs load generators and lm-eval, from that folder, against a deployment.

Writes docs/load-clients.md, and ends with an error if one of them does not get what it asked for. Models and data are
made here, because nothing is downloaded.
"""

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.helpers.client_deployment import client_deployment

ROOT = Path(__file__).parents[2]
LIMIT_S = 900
NUM_REQUESTS, NUM_TOKENS = 6, 8
HEADER = """\
# Load generators and lm-eval

`make test-load-clients` runs these against a deployment of the demo pair and writes this table. The clients that
applications use are in [clients.md](clients.md).

"""
ROWS = [
    {"text": "def add(a, b):\n    return a + b", "q": "import", "choices": [" os", " zebra"], "answer": 0},
    {
        "text": "for i in range(10):\n    print(i)",
        "q": "def f(x):\n    return",
        "choices": [" x", " zebra"],
        "answer": 0,
    },
]
TASK = """\
task: echelon_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{text}"
{more}
"""
TASKS = {
    "choice": (
        "{{q}}",
        'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ntarget_delimiter: ""\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]",
    ),
    "rolling": (
        "",
        'output_type: loglikelihood_rolling\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]',
    ),
    "generate": (
        "{{q}}",
        'output_type: generate_until\ndoc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]',
    ),
}


class Tools:
    """What runs in the environment `folder` against `url`; `parent` has the model and gets files."""

    def __init__(self, folder: Path, url: str, parent: Path) -> None:
        self._folder, self._url, self._parent = folder, url, parent
        self._model = parent / "demo"

    def _run(self, name: str, *arguments: str) -> None:
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_COLOR": "1"}
        command = [str(self._folder / name), *arguments]
        ran = subprocess.run(
            command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=LIMIT_S, cwd=self._parent
        )
        if ran.returncode:
            raise RuntimeError((ran.stderr.strip() or ran.stdout.strip() or "no output").splitlines()[-1])

    def guidellm(self) -> None:
        report = self._parent / "guidellm.json"
        self._run(
            "guidellm",
            "run",
            *("--backend", f"kind=openai_http,target={self._url}", "--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={self._model}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens={NUM_TOKENS}"),
            *("--output", f"kind=json,path={report}", "--disable-progress"),
        )
        [benchmark] = json.loads(report.read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0), totals

    def lm_eval(self) -> None:
        """Scores prompts by `echo` with `logprobs`, and generates."""
        rows, tasks, report = self._parent / "rows.jsonl", self._parent / "tasks", self._parent / "lm-eval"
        rows.write_text("\n".join(map(json.dumps, ROWS)))
        tasks.mkdir()
        for name, (text, more) in TASKS.items():
            (tasks / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows, text=text, more=more))
        options = f"model=demo,base_url={self._url}/v1/completions,tokenizer={self._model},max_length=256"
        names = ",".join(f"echelon_{name}" for name in TASKS)
        self._run(
            "lm_eval",
            *("--model", "local-completions", "--model_args", f"{options},tokenizer_backend=huggingface"),
            *("--tasks", names, "--include_path", str(tasks), "--output_path", str(report)),
        )
        [file] = report.rglob("results*.json")
        results = json.loads(file.read_text())["results"]
        assert results["echelon_choice"]["acc,none"] == 1.0, results
        assert 1 < results["echelon_rolling"]["byte_perplexity,none"] < 20, results


CHECKS: list[tuple[str, str, Callable[[Tools], None]]] = [
    ("guidellm", "`guidellm run`, concurrent chats of synthetic text, streamed", Tools.guidellm),
    ("lm-eval", "`local-completions`: multiple choice, perplexity, generation", Tools.lm_eval),
]


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    [site] = folder.parent.glob("lib/python*/site-packages")
    versions = {
        found.name.replace("_", "-"): found.version for found in importlib.metadata.distributions(path=[str(site)])
    }
    rows, num_failed = [], 0
    with tempfile.TemporaryDirectory() as name, client_deployment(Path(name)) as url:
        tools = Tools(folder, url, Path(name))
        for package, what, check in CHECKS:
            print(f"{package}: {what}", flush=True)
            try:
                check(tools)
                result = "works"
            except Exception as err:  # noqa: BLE001 (whatever goes wrong with a tool is what is reported)
                num_failed, result = num_failed + 1, f"{type(err).__name__}: {err}".splitlines()[0][:200]
            rows.append(f"| {package} {versions[package]} | {what} | {result} |")
    table = "\n".join(["| tool | what it does | result |", "|---|---|---|", *rows])
    today = datetime.date.today().isoformat()
    (ROOT / "docs" / "load-clients.md").write_text(f"{HEADER}{table}\n\nLast run: {today}.\n")
    print(table)
    if num_failed:
        sys.exit(f"{num_failed} of {len(CHECKS)} checks failed")


if __name__ == "__main__":
    main()
