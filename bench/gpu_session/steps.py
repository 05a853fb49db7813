"""What a first session on a GPU runs, most telling first."""

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_session.running import Step

_PYTHON = sys.executable
_MACHINE = (
    "import torch, triton; print(torch.__version__, triton.__version__, torch.version.cuda); "
    "print(torch.cuda.get_device_properties(0)); print(torch.cuda.mem_get_info())"
)
# Each variant is a deployment, which takes a while to start, and a report comes after all of them.
_DEMO_VARIANTS = ("--pipelines", "serial", "continuous", "--sources", "draft", "suffix", "layer-parallel")
_LARGE_VARIANTS = ("--pipelines", "serial", "continuous", "--sources", "draft", "layer-parallel")
_PLAINEST = ("--pipelines", "serial", "--sources", "draft")
# Files of tests/triton by what a wrong result in them would break.
_TRITON = {
    "attention": ("paged_attention", "prefill_attention", "static_schedule", "attention_invariance", "large_caches"),
    "layers": ("rms_norm", "silu_and_mul", "reshape_and_cache", "linear", "layer_parallel_qkv", "block_copy"),
    "rounded-weights": ("mxfp4", "integer_linear"),
    "sampling": ("sample", "sampler", "sampling_ops", "noise", "truncation_threshold"),
    "whole-rounds": ("hot_path", "end_to_end"),
    "rounded-kv": ("kv_quant", "fp8_caches"),
    "not-yet-called": ("cascade_merge", "shared_prefix", "chunk_bounds"),
}


def gpu_steps(work: Path) -> list[Step]:
    """The steps of a session. Models that they make go to `work`."""
    return [
        Step(
            name="machine",
            shows="versions, the device and its memory",
            command=[_PYTHON, "-c", _MACHINE],
            limit_s=60,
        ),
        _tests("cuda", "tokens and noise equal those of the CPU", ["tests/gpu/test_cuda.py"], limit_s=180),
        _speculate(
            "demo-pair",
            "the demo pair through gateway and scheduler on one GPU, with outputs beside plain decoding",
            [*_DEMO_VARIANTS, "--dtype", "float32", "-k", "3", "--prompts", "4", "--tokens", "48", "--runs", "1"],
            limit_s=150,
        ),
        _bench("first_request", "the first requests wait for no compiler", ["--device", "cuda"], limit_s=150),
        *(
            _tests(f"kernels-{name}", "the kernels as a device computes them", _files(names), limit_s=120)
            for name, names in _TRITON.items()
            if name != "not-yet-called"
        ),
        _bench("kernels", "each operator beside what a user would take instead", ["--device", "cuda"], limit_s=150),
        _tests("tiers", "copies between device and host memory", ["tests/gpu/test_tiers.py"], limit_s=60),
        *_large_pair(work),
        _bench("tiers", "hits from host memory and disk", _tiers_options(work), limit_s=120),
        _tests("kernels-not-yet-called", "kernels without a caller", _files(_TRITON["not-yet-called"]), limit_s=120),
        *(_sanitizer(tool) for tool in ("memcheck", "racecheck")),
        _tests(
            "two-gpus", "one-shot sums between two GPUs; skipped with one", ["tests/gpu/test_one_shot.py"], limit_s=120
        ),
    ]


def _large_pair(work: Path) -> list[Step]:
    """The demo pair inflated to the sizes of a Llama of 8B and one of 1B."""
    target, draft = work / "target", work / "draft"
    pair = ["--target", str(target), "--draft", str(draft)]
    return [
        _inflate("demo-target", target, "target-8b", limit_s=150),
        _inflate("demo-draft", draft, "draft-1b", limit_s=60),
        *(
            Step(
                name=f"large-steps{suffix}",
                shows=f"what a step of the large pair costs inside a worker, {how} CUDA graphs",
                command=[_PYTHON, "-m", "bench.steps", *pair, "--device", "cuda", "--save", *options],
                limit_s=120,
            )
            for suffix, how, options in (("-graphs", "with", ["--graphs"]), ("", "without", []))
        ),
        _speculate(
            "large-pair",
            "plain, serial, continuous and layer-parallel drafting of the large pair",
            [*pair, *_LARGE_VARIANTS, "-k", "5", "--prompts", "4", "--runs", "1", "--temperatures", "0"],
            limit_s=300,
        ),
        _speculate(
            "large-pair-without-graphs",
            "plain decoding and serial drafting without CUDA graphs",
            [*pair, *_PLAINEST, "-k", "5", "--prompts", "4", "--runs", "1", "--temperatures", "0", "--graphs", "off"],
            limit_s=300,
        ),
    ]


def _inflate(model: str, to: Path, preset: str, *, limit_s: float) -> Step:
    command = [_PYTHON, "-m", "bench.inflate", f"models/{model}", str(to), "--preset", preset]
    return Step(name=f"make-{preset}", shows="the model is written", command=command, limit_s=limit_s)


def _tiers_options(work: Path) -> list[str]:
    return ["--device", "cuda", "--target", str(work / "target"), "--draft", str(work / "draft"), "--lengths", "1024"]


def _tests(name: str, shows: str, files: Sequence[str], *, limit_s: float) -> Step:
    """Tests are spread over processes, because compiling kernels takes most of their time."""
    command = [_PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-n", "8", "--dist", "worksteal", *files]
    return Step(name=f"test-{name}", shows=shows, command=command, limit_s=limit_s)


def _files(names: Sequence[str]) -> list[str]:
    return [f"tests/triton/test_{name}.py" for name in names]


def _bench(name: str, shows: str, options: Sequence[str], *, limit_s: float) -> Step:
    command = [_PYTHON, "-m", f"bench.{name}", *options, "--save"]
    return Step(name=f"bench-{name}", shows=shows, command=command, limit_s=limit_s)


def _speculate(name: str, shows: str, options: Sequence[str], *, limit_s: float) -> Step:
    command = [_PYTHON, "-m", "bench.speculate", "--device", "cuda", *options, "--name", f"speculate-{name}", "--save"]
    return Step(name=name, shows=shows, command=command, limit_s=limit_s)


def _sanitizer(tool: str) -> Step:
    tests = [_PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-x", *_files(["block_copy"])]
    return Step(
        name=f"sanitizer-{tool}",
        shows="no stray access and no race in block copies",
        command=["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *tests],
        limit_s=120,
    )
