"""generate and chat: the commands that talk to a running server."""

import json as json_module
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from echelon.cli.connection import connect
from echelon.cli.output import UsageProblem, exits, report_error, stderr, write, write_json
from echelon.client import Client
from echelon.errors import EchelonError
from echelon.requests import ChatMessage, GenerateOptions, Prompt, SpeculationOptions
from echelon.results import Completion, Usage
from echelon.streams import Stream

AddressOption = Annotated[str, typer.Option("--address", envvar="ECHELON_ADDRESS", help="host:port of the gateway.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Default: up to max_model_len.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", min=0, help="0 is greedy. Default: the model's.")
]
TopP = Annotated[float | None, typer.Option("--top-p")]
TopK = Annotated[int | None, typer.Option("--top-k")]
MinP = Annotated[float | None, typer.Option("--min-p")]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty")]
PresencePenalty = Annotated[float | None, typer.Option("--presence-penalty")]
FrequencyPenalty = Annotated[float | None, typer.Option("--frequency-penalty")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="The same seed gives the same output.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Stop string; can be repeated.")]
NoSpeculation = Annotated[bool, typer.Option("--no-speculation", help="Decode this request without drafts.")]
NumDrafts = Annotated[
    int | None,
    typer.Option("--num-speculative-tokens", min=0, help="Verify this fixed number of drafts in each round."),
]
CacheSalt = Annotated[
    str | None, typer.Option("--cache-salt", help="Share cached KV only with requests of the same salt.")
]
AttentionMode = Annotated[
    str | None,
    typer.Option("--attention", help="'budgeted': the context may be longer than the devices hold. Default: full."),
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", min=0, help="Deadline in seconds, including time in the queue.")
]
Stats = Annotated[bool, typer.Option("--stats", help="Print statistics of the request to standard error.")]

DEFAULT_ADDRESS = "127.0.0.1:50051"


@exits
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue. '-' or no prompt reads standard input.", show_default=False)
    ] = None,
    address: AddressOption = DEFAULT_ADDRESS,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    n: Annotated[
        int | None, typer.Option("--n", "-n", min=1, help="Number of samples; more than one implies --no-stream.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", min=0, help="Number of likeliest tokens to report for each position, with --json."),
    ] = None,
    min_tokens: Annotated[int | None, typer.Option("--min-tokens", min=0)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos")] = False,
    no_special_tokens: Annotated[
        bool, typer.Option("--no-special-tokens", help="Add no BOS: the prompt has its special tokens already.")
    ] = False,
    model: Annotated[str | None, typer.Option("--model", help="Fail unless this model is served.")] = None,
    cache_salt: CacheSalt = None,
    attention: AttentionMode = None,
    timeout: Timeout = None,
    no_speculation: NoSpeculation = False,
    num_speculative_tokens: NumDrafts = None,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the text once it is complete.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the completion as one JSON document.")] = False,
    stats: Stats = False,
) -> None:
    """Continue a text and print it while it is generated."""
    options = GenerateOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop,
        n=n,
        logprobs=logprobs,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos or None,
        add_special_tokens=False if no_special_tokens else None,
        model=model,
        cache_salt=cache_salt,
        attention=attention,
        timeout_s=timeout,
        speculation=_speculation(no_speculation, num_speculative_tokens),
    )
    with connect(address) as client, _start(client, _read_prompt(prompt), options) as stream:
        if json:
            write_json(stream.result())
        elif no_stream or (n or 1) > 1:
            _print_samples(stream.result())
        else:
            _print_as_it_comes(stream)
        if stats:
            stderr().print(stats_table(stream.result()))


@exits
def chat(
    address: AddressOption = DEFAULT_ADDRESS,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    template_kwargs: Annotated[
        str | None,
        typer.Option(
            "--chat-template-kwargs", help="""Variables of the chat template, as JSON: '{"enable_thinking": false}'."""
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    cache_salt: CacheSalt = None,
    attention: AttentionMode = None,
    timeout: Timeout = None,
    no_speculation: NoSpeculation = False,
    stats: Stats = False,
) -> None:
    """Talk to the model; a line is a message. /reset starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer."""
    options = GenerateOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        cache_salt=cache_salt,
        attention=attention,
        timeout_s=timeout,
        speculation=_speculation(no_speculation, None),
        chat_template_kwargs=_template_kwargs(template_kwargs),
    )
    with connect(address) as client:
        info = client.model_info()
        if not info.has_chat_template:
            raise UsageProblem(f"model {info.model!r} has no chat template; use `echelon generate`")
        stderr().print(f"{info.model} at {address}. /reset starts over, /quit leaves.", markup=False)
        _Conversation(client, options, system=system, show_stats=stats).run()


class _Conversation:
    """The loop of `chat`: it keeps the history, runs commands, and lets answers be interrupted."""

    def __init__(self, client: Client, options: GenerateOptions, *, system: str | None, show_stats: bool) -> None:
        self._client = client
        self._options = options
        self._show_stats = show_stats
        self._beginning = [ChatMessage(role="system", content=system)] if system else []
        self._history = list(self._beginning)

    def run(self) -> None:
        while (line := _read_line()) is not None:
            if line == "/quit":
                return
            if line == "/reset":
                self._history = list(self._beginning)
            elif line.startswith("/"):
                report_error(f"unknown command {line}; the commands are /reset and /quit")
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Send the message with the history. Only a message that got an answer joins the history."""
        messages = [*self._history, ChatMessage(role="user", content=line)]
        parts: list[str] = []
        try:
            with _start(self._client, messages, self._options) as stream:
                for chunk in stream:
                    parts.append(chunk.text)
                    write(chunk.text)
                if self._show_stats:
                    stderr().print(stats_table(stream.result()))
        except KeyboardInterrupt:
            stderr().print(" (stopped)", style="dim")
        except (EchelonError, UsageProblem) as err:
            report_error(str(err))
            return
        write("\n")
        self._history = [*messages, ChatMessage(role="assistant", content="".join(parts))]


def _read_line() -> str | None:
    """The next message, or None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as err:
        raise UsageProblem(f"standard input: invalid UTF-8 at byte {err.start}") from err


def _read_prompt(argument: str | None) -> str:
    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        raise UsageProblem("PROMPT is missing: give a text or pipe one in")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as err:
        raise UsageProblem(f"standard input: invalid UTF-8 at byte {err.start} ({err.reason})") from err


def _start(client: Client, prompt: Prompt, options: GenerateOptions) -> Stream:
    try:
        return client.stream(prompt, **options)
    except (TypeError, ValueError) as err:
        raise UsageProblem(str(err)) from err


def _speculation(disabled: bool, num_tokens: int | None) -> SpeculationOptions | None:
    if disabled and num_tokens:
        raise UsageProblem("--no-speculation and --num-speculative-tokens cannot be combined")
    if disabled:
        return SpeculationOptions(enabled=False)
    return None if num_tokens is None else SpeculationOptions(num_speculative_tokens=num_tokens)


def _template_kwargs(text: str | None) -> dict[str, Any] | None:
    try:
        value = None if text is None else json_module.loads(text)
    except ValueError as err:
        raise UsageProblem(f"--chat-template-kwargs: is not JSON: {err}") from err
    if value is not None and not isinstance(value, dict):
        raise UsageProblem(f"--chat-template-kwargs: must be a JSON object, got {text}")
    return value


def _print_as_it_comes(stream: Stream) -> None:
    last = ""
    for chunk in stream:
        write(chunk.text)
        last = chunk.text or last
    if not last.endswith("\n"):
        write("\n")


def _print_samples(completion: Completion) -> None:
    for sample in completion.samples:
        if len(completion.samples) > 1:
            write(f"--- {sample.index} ({sample.finish_reason})\n")
        write(sample.text if sample.text.endswith("\n") else sample.text + "\n")


def stats_table(completion: Completion) -> Table:
    """The statistics of a request, including speculation."""
    usage, speculation, timings = completion.usage, completion.speculation, completion.timings
    table = Table(show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column()
    table.add_row("finish reason", ", ".join(sample.finish_reason for sample in completion.samples))
    table.add_row("prompt tokens", str(usage.prompt_tokens))
    table.add_row("from the prefix cache", _cached(usage))
    if usage.approximations:
        table.add_row("not exact", ", ".join(usage.approximations))
    table.add_row("tokens", str(usage.completion_tokens))
    table.add_row("first token", f"{timings.first_token_s * 1e3:.0f} ms ({timings.queue_s * 1e3:.0f} ms in the queue)")
    if timings.total_s:
        table.add_row("tokens/s", f"{usage.completion_tokens / timings.total_s:.1f}")
    if completion.tokens_per_target_step is not None:
        table.add_row("tokens per target step", f"{completion.tokens_per_target_step:.2f}")
    if speculation.acceptance_rate is not None:
        accepted = f"{speculation.num_accepted_tokens} of {speculation.num_draft_tokens}"
        table.add_row("drafts accepted", f"{accepted} ({speculation.acceptance_rate:.0%})")
    table.add_row("seed", str(completion.seed))
    return table


def _cached(usage: Usage) -> str:
    """How many prompt tokens were not computed, and where their KV was unless on the device."""
    tiers = {"host memory": usage.cached_prompt_tokens_from_host, "disk": usage.cached_prompt_tokens_from_disk}
    parts = ", ".join(f"{num_tokens} from {tier}" for tier, num_tokens in tiers.items() if num_tokens)
    return f"{usage.cached_prompt_tokens} ({parts})" if parts else str(usage.cached_prompt_tokens)
