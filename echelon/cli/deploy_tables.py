"""What the commands about deployments show: plans, processes, tiers, changes."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from echelon.cli.output import plain_table, size_text
from echelon.cli.tier_text import fill_of, state_of, trouble_of

if TYPE_CHECKING:
    from cluster.deployment.changes import Change
    from cluster.planning.plan import Bundle, Plan
    from cluster.processes.status import ProcessStatus, TierUse

SERVING = ("READY", "DEGRADED")
STATE_STYLES = {
    "READY": "green",
    "DEGRADED": "yellow",
    "RECOVERING": "bold yellow",
    "DRAINED": "bold yellow",
    "NOT_RESPONDING": "bold red",
    "FAILED": "bold red",
    "STARTING": "cyan",
}


def plan_table(made: "Plan") -> Table:
    """Where each process runs, and how much memory it takes. Nodes have rows, as a column would not fit a terminal."""
    table = plain_table()
    nodes = list(dict.fromkeys(process.address for process in made.processes))
    where = "" if len(nodes) > 1 else f", node {made.gateways[0].process.address}"
    table.title, table.title_justify = f"plan of {made.deployment} on {made.device}{where}", "left"
    remarks = "\n".join(_remarks(made))
    table.caption, table.caption_justify = Text(remarks) if remarks else None, "left"
    for heading in ("process", "devices"):
        table.add_column(heading, no_wrap=True)
    has_host_tier = any(bundle.memory.host_bytes for bundle in made.bundles)
    for heading in ("weights", "KV cache", "activations", "total", *(["host KV"] if has_host_tier else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for address in nodes:
        if len(nodes) > 1:
            table.add_row(Text(f"node {address}", style="bold"))
        for bundle in made.bundles:
            if bundle.address == address:
                table.add_row(*_bundle_row(bundle, has_host_tier))
        for process in (*(replica.scheduler for replica in made.replicas), *made.gateway_processes):
            if process.address == address:
                table.add_row(process.name)
    return table


def drafters_table(made: "Plan") -> Table:
    """What drafters would gain: a row for each, a column for each acceptance."""
    table = plain_table("drafter")
    table.title, table.title_justify = "speed as a multiple of plain decoding, estimated (drafts a round)", "left"
    acceptances = list(dict.fromkeys(each.acceptance for each in made.drafters))
    for heading in ("a step reads", "takes", *(f"{acceptance:g} accepted" for acceptance in acceptances)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(each.name for each in made.drafters):
        of_name = [each for each in made.drafters if each.name == name]
        gains = [f"{each.speedup:.1f} ({each.num_drafts})" for each in of_name]
        table.add_row(name, size_text(of_name[0].step_bytes), f"{1e3 * of_name[0].step_s:.1f} ms", *gains)
    table.caption = Text("one request, 1024 tokens of context; bandwidth and latency are assumed, not measured")
    table.caption_justify = "left"
    return table


def _bundle_row(bundle: "Bundle", has_host_tier: bool) -> list[str]:
    memory = bundle.memory
    sizes = [memory.weight_bytes, memory.kv_cache_bytes, memory.activation_bytes, memory.total_bytes]
    if has_host_tier:
        sizes.append(memory.host_bytes)
    if bundle.num_gpus:
        devices = f"{bundle.num_gpus} GPU"
    elif bundle.cpu_ids:
        devices = f"cores {', '.join(map(str, bundle.cpu_ids))}"
    else:
        devices = "shared"
    return [bundle.name, devices, *(size_text(size) for size in sizes)]


def _remarks(made: "Plan") -> Iterator[str]:
    if made.eos:
        listed = ", ".join(f"{token.token_id} {token.text!r} ({', '.join(token.files)})" for token in made.eos)
        yield f"a stream stops at token {listed}"
    if made.http_url:
        yield f"OpenAI's API will be at {made.http_url}/v1"
    yield from (f"note: {note}" for note in made.notes)


def process_table(processes: "tuple[ProcessStatus, ...]") -> Table:
    spares = ("spare",) if any(process.spare for process in processes) else ()
    table = plain_table("process", "state", "node", "devices", "pid", *spares, "")
    for process in processes:
        table.add_row(
            process.name,
            Text(str(process.state), style=STATE_STYLES.get(process.state, "")),
            process.node,
            process.devices,
            "" if process.pid is None else str(process.pid),
            *([process.spare] if spares else []),
            _doing(process),
        )
    return table


def tier_table(tiers: "tuple[TierUse, ...]") -> Table:
    """Host memory and disk below the device blocks of each engine."""
    table = plain_table("KV cache")
    for heading in ("used", "of", "stored", "fetched", "failed", "evicted", "saved"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column()
    several = len({tier.replica for tier in tiers}) > 1
    for tier in tiers:
        failed = f"{tier.num_failed} ({tier.num_damaged})" if tier.num_damaged else str(tier.num_failed)
        counts = (str(tier.num_stored), str(tier.num_fetched), failed, str(tier.num_evicted))
        saved = f"{round(tier.saved_s, 1) + 0.0:.1f} s"  # never -0.0
        replica = f" of replica {tier.replica}" if several else ""
        table.add_row(f"{tier.engine} {tier.tier}{replica}", *fill_of(tier), *counts, saved, state_of(tier))
    troubles = [f"{tier.engine} {tier.tier}: {trouble}" for tier in tiers if (trouble := trouble_of(tier))]
    caption = Text("\n".join(["bytes are those on each rank, numbers are blocks, damaged ones in brackets", *troubles]))
    table.caption, table.caption_justify = caption, "left"
    return table


def changes_table(changes: "Sequence[Change]") -> Table:
    """What differs between a deployment and its file."""
    table = plain_table("key", "was", "is now", "")
    for change in changes:
        table.add_row(change.key, change.old, change.new, change.effect)
    return table


def _doing(process: "ProcessStatus") -> RenderableType:
    """What a process is doing: its error, or the stage that it reported, with a bar if the total is known."""
    if process.error:
        return Text(process.error, style="red")
    if process.state in SERVING or not process.stage:
        return process.address
    if not process.total:
        return process.stage
    line = Table.grid(padding=(0, 1))
    line.add_row(process.stage, ProgressBar(total=process.total, completed=process.done, width=20))
    return line
