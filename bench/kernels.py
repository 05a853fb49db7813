"""What the operators cost: attention, the small operators of a layer, sampling, and products with 4-bit weights.

Each operator is compared with what a user would take instead. Operators that move data are also compared with the speed
at which this machine copies memory, which is measured first. All contenders of a row take turns, so that a busy machine
slows them alike. Results are medians with the least and the greatest value. On a GPU, the cache is full of other data
before every call.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.kernel_bench.attention import AttentionShape, Heads, attention_table, verify_table
from bench.kernel_bench.machine import Machine
from bench.kernel_bench.operators import layer_table, linear_table, mxfp4_table, sample_table
from bench.report import add_report_options, publish

VERIFY_ROWS = 8
LLAMA_8B = Heads(name="Llama-3-8B", num_q_heads=32, num_kv_heads=8)
LLAMA_70B_TP8 = Heads(name="Llama-3-70B, one of 8 ranks", num_q_heads=8, num_kv_heads=1)
even = AttentionShape.even


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What is measured."""

    heads: Sequence[Heads]
    attention: Sequence[AttentionShape]
    verify: Sequence[AttentionShape]
    layer_rows: Sequence[int]
    intermediate: int  # of the MLP
    sample_rows: int
    vocab_size: int
    mxfp4_rows: Sequence[int]
    mxfp4_features: tuple[int, int]  # in, out
    copy_bytes: int


def gpu_program() -> Program:
    mixed = AttentionShape(contexts=tuple(1024 * n for n in (1, 2, 4, 8, 16, 32, 48, 64)))
    decode = [even(1, 4096), even(1, 131072), even(8, 32768), even(64, 4096), mixed]
    return Program(
        heads=[LLAMA_8B, LLAMA_70B_TP8],
        attention=decode,
        verify=decode,
        layer_rows=[1, 64, 8192],
        intermediate=14336,
        sample_rows=64,
        vocab_size=128256,
        mxfp4_rows=[1, 2, 4, 8, 16],
        mxfp4_features=(4096, 14336),
        copy_bytes=1 << 30,
    )


def cpu_program(heads: Heads) -> Program:
    decode = [even(batch, context) for context in (1024, 2048, 4096, 8192) for batch in (1, 2, 4, 8)]
    return Program(
        heads=[heads],
        attention=[
            *decode,
            even(8, 1024, 5),
            even(1, 1024, 8),
            even(1, 4096, 8),
            even(1, 512, 512),
            even(1, 2048, 512),
        ],
        verify=[even(1, 1024), even(1, 4096), even(8, 1024)],
        layer_rows=[1, 8, 64, 512],
        intermediate=4096,
        sample_rows=8,
        vocab_size=128256,
        mxfp4_rows=[1, 4, 16],
        mxfp4_features=(1536, 4096),
        copy_bytes=256 << 20,
    )


def quick_program() -> Program:
    """Runs every path in a second or two, for a test. The numbers mean nothing."""
    return Program(
        heads=[Heads(name="quick", num_q_heads=4, num_kv_heads=2, head_dim=64)],
        attention=[even(2, 40), AttentionShape(contexts=(5, 33)), even(1, 20, 3)],
        verify=[even(1, 40)],
        layer_rows=[3],
        intermediate=64,
        sample_rows=2,
        vocab_size=1000,
        mxfp4_rows=[1],
        mxfp4_features=(512, 1024),
        copy_bytes=1 << 20,
    )


def report(program: Program, machine: Machine) -> str:
    copy_bytes_per_us = machine.copy_bytes_per_us(program.copy_bytes)
    sections = [f"Copies move {copy_bytes_per_us / 1e3:.0f} GB/s, read and written."]
    for heads in program.heads:
        sections += [
            f"## Attention, {heads}",
            attention_table(program.attention, heads, machine, copy_bytes_per_us=copy_bytes_per_us),
            f"## Verifying, {heads}",
            verify_table(program.verify, heads, machine, num_rows=VERIFY_ROWS),
        ]
    layer_heads, (in_features, out_features) = program.heads[0], program.mxfp4_features
    hidden = layer_heads.num_q_heads * layer_heads.head_dim
    sections += [
        f"## The other operators of a layer: hidden {hidden}, intermediate {program.intermediate}",
        layer_table(
            program.layer_rows,
            layer_heads,
            machine,
            intermediate=program.intermediate,
            copy_bytes_per_us=copy_bytes_per_us,
        ),
        f"## Products that do not depend on the batch: {hidden} to {2 * program.intermediate}",
        linear_table(program.layer_rows, machine, in_features=hidden, intermediate=program.intermediate),
        f"## Sampling: {program.sample_rows} rows, vocabulary of {program.vocab_size}",
        sample_table(program.sample_rows, program.vocab_size, machine),
        f"## MXFP4: {in_features} to {out_features}",
        mxfp4_table(program.mxfp4_rows, machine, in_features=in_features, out_features=out_features),
    ]
    return "\n\n".join(sections)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--runs", type=int, help="timings of each step (default: 5 on cpu, 50 on cuda)")
    parser.add_argument("--threads", type=int, default=2, help="on cpu")
    parser.add_argument("--num-q-heads", type=int, default=12, help="on cpu")
    parser.add_argument("--num-kv-heads", type=int, default=4, help="on cpu")
    parser.add_argument("--head-dim", type=int, default=128, help="on cpu")
    add_report_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    on_gpu = args.device == "cuda"
    machine = Machine(
        device=torch.device(args.device),
        runs=args.runs or (50 if on_gpu else 5),
        min_run_s=0.0 if args.quick else 0.02,
    )
    chosen = Heads(name="bench", num_q_heads=args.num_q_heads, num_kv_heads=args.num_kv_heads, head_dim=args.head_dim)
    program = quick_program() if args.quick else gpu_program() if on_gpu else cpu_program(chosen)
    with torch.inference_mode():
        body = report(program, machine)
    threads = "" if on_gpu else f", {args.threads} threads"
    method = f"bf16{threads}; torch {torch.__version__}; median (least-greatest) of {machine.runs} runs"
    command = "python -m bench.kernels" + (" --quick" if args.quick else "")
    publish("kernels", f"{method}\n\n{body}", command=command, save=args.save, on=machine.name)


if __name__ == "__main__":
    main()
