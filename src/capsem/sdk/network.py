"""`Sandbox.network`: what a VM may reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from capsem.api.network_types import AllowResponse, AskInfo, CheckResponse, LearnResponse, NetworkInfo
from capsem.sdk import core

if TYPE_CHECKING:
    from capsem.sdk.sync import Sandbox

T = TypeVar("T")


class Network:
    """What a VM may reach. The words of a policy are in docs/policy.md.

    Changes hold at once: connections go on, and are judged anew at their next request.
    """

    def __init__(self, box: Sandbox) -> None:
        self._box = box

    def info(self, *, timeout: float | None = None) -> NetworkInfo:
        """Its preset, and all rules that hold, the strongest first."""
        return self._call(core.network_info(self._box.id), timeout)

    def set(self, network: core.Network, *, timeout: float | None = None) -> NetworkInfo:
        """Give it another preset or policy: as the `network` of `create`. Raises InvalidInput with all that is wrong."""
        return self._call(core.set_network(self._box.id, network), timeout)

    def allow(
        self,
        host: str,
        *,
        port: int | None = None,
        tcp: bool = False,
        methods: Sequence[str] | None = None,
        for_secs: float | None = None,
        always: bool = False,
        timeout: float | None = None,
    ) -> AllowResponse:
        """Let it reach a host, on the ports of the web unless `port` is given; see `capsem net allow`. `always`: and all VMs
        with the preset medium. Raises PermissionDenied where the company's rules say otherwise.
        """
        body = {
            "host": host,
            "port": port,
            "tcp": tcp,
            "method": None if methods is None else [*methods],
            "for_secs": for_secs,
            "always": always,
        }
        return self._call(core.allow(self._box.id, body), timeout)

    def deny(self, host: str, *, port: int | None = None, timeout: float | None = None) -> AllowResponse:
        """Keep it from a host, whatever else allows it."""
        return self._call(core.deny(self._box.id, {"host": host, "port": port}), timeout)

    def check(self, url: str, method: str = "GET", *, timeout: float | None = None) -> CheckResponse:
        """What would be decided, and by which rule. Nothing is sent."""
        return self._call(core.check(self._box.id, url, method), timeout)

    def asks(self, *, timeout: float | None = None) -> list[AskInfo]:
        """Requests that wait for an answer; they do while somebody follows them, as `capsem net asks` does."""
        return self._call(core.asks(self._box.id), timeout)

    def answer(self, ask: str, *, allow: bool, timeout: float | None = None) -> AllowResponse:
        """Answer one of them, for once. Raises WrongState when it waits no more."""
        call = core.allow if allow else core.deny
        return self._call(call(self._box.id, {"ask": ask}), timeout)

    def log(
        self,
        *,
        since: str | None = None,
        limit: int = 100,
        decision: str | None = None,
        after: int | None = None,
        timeout: float | None = None,
    ) -> list[dict[str, Any]]:
        """What it reached and was kept from, oldest first, as columns of net_events. `after` is the `id` of the last one that
        was seen."""
        query = {"since": since, "limit": limit, "decision": decision, "after": after}
        return self._call(core.network_log(self._box.id, query), timeout)

    def learn(self, *, timeout: float | None = None) -> None:
        """Let through and record what no rule denies, from here on."""
        self._call(core.learn(self._box.id, "start"), timeout)

    def learnt(self, *, paths: bool = False, stop: bool = True, timeout: float | None = None) -> LearnResponse:
        """The policy that lets the same pass again, for the `network` of `create`; with `stop` learning ends."""
        return self._call(core.learn(self._box.id, "stop" if stop else "show", paths=paths), timeout)

    def learn_from_log(
        self, *, since: str | None = None, paths: bool = False, timeout: float | None = None
    ) -> LearnResponse:
        """The policy that would have allowed what was denied."""
        return self._call(core.learn(self._box.id, "denials", paths=paths, since=since), timeout)

    def _call(self, call: core.Call[T], timeout: float | None) -> T:
        return self._box._transport.call(call, timeout)  # noqa: SLF001
