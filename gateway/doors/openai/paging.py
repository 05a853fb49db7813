"""Lists of OpenAI's API, page by page."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.jobs.store import Page
from gateway.requests.refusal import invalid, shown

_DEFAULT, _MOST = 20, 1000


def page_of(request: Request) -> Page:
    """One entry more than is wanted, which shows whether there are more. Raises Refusal."""
    given = request.query_params.get("limit", str(_DEFAULT))
    limit = int(given) if given.isdecimal() and len(given) < 10 else 0
    if not 1 <= limit <= _MOST:
        raise invalid(f"limit: must be from 1 to {_MOST}, got {shown(given)}")
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid(f"order: must be asc or desc, got {shown(order)}")
    return Page(limit=limit + 1, after=request.query_params.get("after", ""), newest_first=order == "desc")


def write_page(entries: list[dict[str, Any]], page: Page) -> Response:
    """`entries` of such a page."""
    has_more = len(entries) == page.limit
    shown_entries = entries[: page.limit - 1]
    ends = (shown_entries[0]["id"], shown_entries[-1]["id"]) if shown_entries else (None, None)
    answer = {"object": "list", "data": shown_entries, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}
    return JSONResponse(answer)
