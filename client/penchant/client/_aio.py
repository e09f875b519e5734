"""The same client for asyncio: each call runs in a thread of its own client's, so that the event loop never waits."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from penchant.client._client import Client
from penchant.client._types import Feedback, Forgotten, Interests, Privacy, Recommendation, SyncResult, Trust

if TYPE_CHECKING:
    from penchant.client._keys import KeySource
    from penchant.client._salvage import Salvaged
    from penchant.common.catalogue import Catalogue
    from penchant.common.interests import Policy
    from penchant.common.interests.explanations import Explanation

P = ParamSpec("P")
R = TypeVar("R")


class AsyncClient:
    """As `Client`, awaited. Make one with `await AsyncClient.open(…)`, or `async with` what that gives."""

    def __init__(self, client: Client, threads: ThreadPoolExecutor) -> None:
        self._client, self._threads = client, threads

    @classmethod
    async def open(cls, folder: str | Path, **options: Any) -> Self:
        """As `Client.open`, with the same options and errors."""
        threads = ThreadPoolExecutor(2, thread_name_prefix="penchant")  # a list need not wait for a sync
        try:
            opened = functools.partial(Client.open, folder, **options)
            return cls(await asyncio.get_running_loop().run_in_executor(threads, opened), threads)
        except BaseException:
            threads.shutdown(wait=False)
            raise

    @classmethod
    async def salvage(cls, folder: str | Path, *, key: KeySource | None = None) -> Salvaged:
        return await asyncio.get_running_loop().run_in_executor(
            None, functools.partial(Client.salvage, folder, key=key)
        )

    async def observe(
        self,
        item: str,
        kind: str = "view",
        *,
        dwell_s: float | None = None,
        rating: float | None = None,
        strength: float | None = None,
        context: Mapping[str, str] | None = None,
        at_ms: int | None = None,
    ) -> None:
        observe = functools.partial(self._client.observe, dwell_s=dwell_s, rating=rating, strength=strength)
        await self._run(observe, item, kind, context=context, at_ms=at_ms)

    async def feedback(self, item: str, kind: Feedback, *, topic: str | None = None) -> str:
        return await self._run(self._client.feedback, item, kind, topic=topic)

    async def allow(self, refused: str) -> None:
        await self._run(self._client.allow, refused)

    async def recommend(
        self, n: int = 10, *, context: Mapping[str, str] | None = None, policy: Policy | None = None
    ) -> list[Recommendation]:
        return await self._run(self._client.recommend, n, context=context, policy=policy)

    async def interests(self, n: int = 10) -> Interests:
        return await self._run(self._client.interests, n)

    async def explain(self, item: str, *, context: Mapping[str, str] | None = None) -> Explanation:
        return await self._run(self._client.explain, item, context=context)

    async def agree(self, trust: Trust, *, consent: str = "") -> None:
        await self._at_once(self._client.agree, trust, consent=consent)

    @property
    def trust(self) -> Trust:
        return self._client.trust

    @property
    def catalogue(self) -> Catalogue:
        return self._client.catalogue

    @property
    def closed(self) -> bool:
        return self._client.closed

    async def enrol(self, token: str, deadline_s: float = 30.0) -> None:
        await self._run(self._client.enrol, token, deadline_s)

    async def start(self) -> bool:
        return await self._run(self._client.start)

    async def stop(self) -> None:
        await self._at_once(self._client.stop)

    async def sync(self, deadline_s: float = 30.0) -> SyncResult:
        return await self._run(self._client.sync, deadline_s)

    async def privacy(self) -> Privacy:
        return await self._run(self._client.privacy)

    async def export(self) -> dict[str, Any]:
        return await self._run(self._client.export)

    async def forget(self, *, everything: bool = False) -> Forgotten:
        receipt = await self._at_once(self._client.forget, everything=everything)
        self._threads.shutdown(wait=False)
        return receipt

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._client.close)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _at_once(self, call: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
        """Waits for no other call of this client's: a person's no is not behind a sync."""
        return await asyncio.get_running_loop().run_in_executor(None, functools.partial(call, *args, **named))

    async def _run(self, call: Callable[P, R], *args: P.args, **named: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(call, *args, **named))
