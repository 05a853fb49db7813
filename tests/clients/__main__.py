"""`python -m tests.clients PYTHON`: runs checks.py with that interpreter against a deployment of the demo pair.

Writes docs/clients.md. Fails if a client does not get what it asked for.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.client_deployment import client_deployment

ROOT = Path(__file__).parents[2]
HEADER = """\
# Clients of others

`make test-clients` runs these clients against a deployment of the demo pair and writes this table. [http.md](http.md)
says which fields they can use.

"""


def main() -> None:
    python = sys.argv[1]
    with tempfile.TemporaryDirectory() as parent, client_deployment(Path(parent)) as url:
        results_file = Path(parent) / "results"
        command = [python, ROOT / "tests" / "clients" / "checks.py", url, results_file]
        # LiteLLM would ask the internet for prices.
        subprocess.run(command, check=True, env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"})
        results = [json.loads(line) for line in results_file.read_text().splitlines()]
    rows = [f"| {entry['client']} | {entry['what']} | {entry['problem'] or 'works'} |" for entry in results]
    table = "\n".join(["| client | what it does | result |", "|---|---|---|", *rows])
    today = datetime.date.today().isoformat()
    (ROOT / "docs" / "clients.md").write_text(f"{HEADER}{table}\n\nLast run: {today}.\n")
    print(table)
    failed = [entry for entry in results if entry["problem"]]
    if failed:
        sys.exit(f"{len(failed)} of {len(results)} checks failed")


if __name__ == "__main__":
    main()
