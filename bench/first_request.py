"""Whether the first requests after a start wait for something that later ones do not: compilers, libraries.

Each kind of request is sent twice, to a deployment that has just become ready. The first of a kind should take about as
long as the second.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from bench.report import add_report_options, hardware, publish, table
from cluster.deployment.settings import CpuSettings, KvCacheSettings, SpeculationSettings
from cluster.local import LOCAL_SCHEDULER, LocalDeployment, LocalDraft, local_settings
from echelon import Client

MODELS = Path(__file__).parents[1] / "models"
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 1},
    "truncated": {"temperature": 1.0, "seed": 1, "top_k": 40, "top_p": 0.9},
    "log-probabilities": {"logprobs": 5},
    "penalties": {"repetition_penalty": 1.2, "logit_bias": {5: 1.0}},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=MODELS / "demo-target")
    parser.add_argument("--draft", type=Path, default=MODELS / "demo-draft")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16)
    add_report_options(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    settings = local_settings(
        args.target,
        draft=LocalDraft(folder=args.draft, colocated=True),
        device=args.device,
        dtype="bfloat16",
        cpu=CpuSettings(threads_per_worker=args.threads),
        kv_cache=KvCacheSettings(device_bytes=256 << 20),
        scheduler=LOCAL_SCHEDULER,
        speculation=SpeculationSettings(num_speculative_tokens=5),
        startup_timeout_s=600.0,
    )
    rng = random.Random(1)
    rows = []
    with LocalDeployment(settings, gateway=True) as deployment, Client(deployment.running.gateway_address) as client:
        for kind, sampling in KINDS.items():
            seconds = []
            for _ in range(2):
                prompt = rng.choices(range(16, 1000), k=args.prompt_tokens)  # nothing of it is cached
                options = {"temperature": 0.0, **sampling}
                done = client.generate(prompt, max_tokens=args.tokens, ignore_eos=True, **options)
                seconds.append(done.timings.total_s)
            rows.append([kind, *(f"{s * 1000:.0f}" for s in seconds), f"{seconds[0] / seconds[1]:.2f}"])
    body = table(["request", "first, ms", "second, ms", "ratio"], rows)
    command = "python -m bench.first_request " + " ".join(sys.argv[1:])
    publish("first-request", body, command=command, save=args.save, on=hardware(args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
