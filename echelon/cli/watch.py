"""status --watch: the state of all replicas, refreshed."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from echelon.cli.connection import connect_operator
from echelon.cli.output import plain_table, size_text, stdout, write
from echelon.cli.tier_text import fill_of, state_of, trouble_of
from echelon.cli.watching import ReplicaView, TierView, view

Show = Callable[[Sequence[ReplicaView]], None]

# Heading, what a plain line calls it, and its value.
_COLUMNS: tuple[tuple[str, str, Callable[[ReplicaView], str]], ...] = (
    ("tok/s", "tokens/s", lambda v: "-" if v.tokens_per_s is None else f"{v.tokens_per_s:.1f}"),
    ("run", "running", lambda v: str(v.num_requests_running)),
    ("queue", "waiting", lambda v: str(v.num_requests_waiting)),
    ("accept", "acceptance", lambda v: _percent(v.acceptance_rate)),
    ("k", "k", lambda v: "-" if v.drafts_per_verification is None else f"{v.drafts_per_verification:.1f}"),
    ("draft\nidle", "draft_idle", lambda v: _percent(v.draft_idle_share)),
    ("verify\nwait", "verify_wait", lambda v: _percent(v.verify_wait_share)),
    ("cache\nhits", "verdict_cache_hits", lambda v: _percent(v.verdict_cache_hit_rate)),
    ("window", "window", lambda v: _percent(v.window_occupancy)),
    ("KV", "kv", lambda v: _percent(v.kv_cache_usage)),
)
# Of a tier of the KV cache: heading and value.
_TIER_COLUMNS: tuple[tuple[str, Callable[[TierView], str]], ...] = (
    ("used", lambda t: fill_of(t)[0]),
    ("of", lambda t: fill_of(t)[1]),
    ("hits", lambda t: "-" if t.num_hits is None else str(t.num_hits)),
    ("fetched/s", lambda t: _rate(t.fetched_bytes_per_s)),
    ("stored/s", lambda t: _rate(t.stored_bytes_per_s)),
)


def watch(address: str, *, interval_s: float, count: int | None, json_lines: bool) -> None:
    """Show the replicas behind the gateway at `address` every `interval_s`, `count` times or until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt), connect_operator(address) as control, _display(json_lines) as show:
        before, before_s = control.replicas(), time.monotonic()
        shown = 0
        while count is None or shown < count:
            time.sleep(interval_s)
            after, after_s = control.replicas(), time.monotonic()
            pairs = zip(before.replicas, after.replicas, strict=True)
            show([view(old, new, after_s - before_s) for old, new in pairs])
            before, before_s = after, after_s
            shown += 1


@contextlib.contextmanager
def _display(json_lines: bool) -> Iterator[Show]:
    """A table that refreshes on a terminal, or lines elsewhere."""
    console = stdout()
    if json_lines or not console.is_terminal:
        yield _write_json_line if json_lines else _write_lines
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda views: live.update(Group(*tables(views)), refresh=True)


def tables(views: Sequence[ReplicaView]) -> list[Table]:
    """The replicas and, if they have any, the tiers of their KV caches."""
    return [views_table(views), tiers_table(views)] if any(seen.tiers for seen in views) else [views_table(views)]


def views_table(views: Sequence[ReplicaView]) -> Table:
    table = plain_table()
    table.add_column("replica", no_wrap=True)
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True, min_width=4)
    for seen in views:
        table.add_row(str(seen.replica), *(value(seen) for _, _, value in _COLUMNS))
    trouble = [f"replica {seen.replica} is {_trouble(seen)}" for seen in views if not seen.ready]
    table.caption, table.caption_justify = Text("\n".join(trouble)) if trouble else None, "left"
    return table


def tiers_table(views: Sequence[ReplicaView]) -> Table:
    table = plain_table("replica", "KV cache", "tier")
    for heading, _ in _TIER_COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column()
    for seen in views:
        for tier in seen.tiers:
            values = (value(tier) for _, value in _TIER_COLUMNS)
            table.add_row(str(seen.replica), tier.engine, tier.tier, *values, state_of(tier))
    troubles = [
        f"replica {seen.replica} {tier.engine} {tier.tier}: {trouble}"
        for seen in views
        for tier in seen.tiers
        if (trouble := trouble_of(tier))
    ]
    table.caption, table.caption_justify = Text("\n".join(troubles)) if troubles else None, "left"
    return table


def _write_lines(views: Sequence[ReplicaView]) -> None:
    for seen in views:
        values = " ".join(f"{name}={value(seen)}" for _, name, value in _COLUMNS)
        trouble = _trouble(seen)
        write(f"replica {seen.replica}: {values}{f' ({trouble})' if trouble else ''}\n")
        for tier in seen.tiers:
            _write_tier_line(seen, tier)


def _write_tier_line(seen: ReplicaView, tier: TierView) -> None:
    values = " ".join(f"{name}={value(tier).replace(' ', '')}" for name, value in _TIER_COLUMNS)
    trouble = trouble_of(tier)
    write(f"replica {seen.replica} {tier.engine} {tier.tier}: {values}{f' ({trouble})' if trouble else ''}\n")


def _write_json_line(views: Sequence[ReplicaView]) -> None:
    write(json.dumps({"replicas": [dataclasses.asdict(seen) for seen in views]}) + "\n")


def _trouble(seen: ReplicaView) -> str:
    return "" if seen.ready else f"not ready: {seen.reason}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _rate(bytes_per_s: float | None) -> str:
    return "-" if bytes_per_s is None else size_text(bytes_per_s)
