"""Between a parsed request and its generation: which arm answers it, and how the answer says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from starlette.concurrency import run_in_threadpool

from soppu.serve.api.requests import ParsedRequest
from soppu.serve.names import header_value
from soppu.serve.router.deciding import RequestRouter


class Routing:
    """The router of an application, or none: then every request stays what it is."""

    def __init__(self, router: RequestRouter | None) -> None:
        self._router = router

    async def route(self, parsed: ParsedRequest) -> ParsedRequest:
        """The request with the adapter that answers it. Deciding may run the model: it has a thread."""
        if self._router is None:
            return parsed
        decision = await run_in_threadpool(self._router.decide, parsed.generation)
        generation = replace(parsed.generation, adapter_id=decision.adapter_id)
        return replace(parsed, generation=generation, decision=decision)

    async def route_all(self, candidates: Sequence[ParsedRequest], *, each: int) -> tuple[ParsedRequest, ...]:
        """Likewise, `each` of one prompt, which is decided on once."""
        routed: list[ParsedRequest] = []
        for start in range(0, len(candidates), each):
            first = await self.route(candidates[start])
            adapter_id = first.generation.adapter_id
            routed += [
                replace(
                    one, generation=replace(one.generation, adapter_id=adapter_id), decision=first.decision
                )
                for one in candidates[start : start + each]
            ]
        return tuple(routed)


def told(*prompts: ParsedRequest) -> dict[str, str]:
    """Headers that say which arm answers, one after the other where prompts differ; none without a router."""
    said = [parsed.decision.told for parsed in prompts if parsed.decision]
    names = dict.fromkeys(name for one in said for name in one)
    values = {name: [one.get(name, "-") for one in said] for name in names}
    return {
        f"x-router-{name}": header_value(found[0] if len(set(found)) == 1 else ", ".join(found))
        for name, found in values.items()
    }
