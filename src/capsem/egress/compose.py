"""A VM's policy, put together from the layers: what the service knows and hands over by value, and what the VM's own is.

`Layers` travels to the supervisor as JSON, when it starts and whenever a file has changed; the VM's own document is in its
record. `compose` makes of both what judges, and what the connections to the outside need beside that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from capsem.egress.document import NOTHING, Document, from_dict
from capsem.egress.facts import Action, Layer
from capsem.egress.policy import Floor, Policy
from capsem.egress.values import ClientCertificate
from capsem.model.errors import InvalidInput

LARGEST: Final = 320 * 1024  # bytes of `to_json`: it travels in one message, with a VM's own document
PROXY_VARIABLES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@dataclass(frozen=True)
class Layers:
    """All layers but the VM's own. `preset` holds the rules of the VM's preset; `environment` what the host's environment
    says about proxies."""

    corporate: Document = NOTHING
    user: Document = NOTHING
    preset: Document = NOTHING
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def to_json(self) -> str:
        """As text; `layers_from_json` is the opposite. Raises InvalidInput when that is too much."""
        text = json.dumps(
            {
                "corporate": self.corporate.to_dict(),
                "user": self.user.to_dict(),
                "preset": self.preset.to_dict(),
                "environment": dict(self.environment),
            },
            separators=(",", ":"),
        )
        if len(text) > LARGEST:
            raise InvalidInput(
                f"the rules of the corporate file, the user's file and the preset are {len(text)} bytes, {LARGEST} is the limit",
                hint="write *.example.com for many names of one domain",
            )
        return text


class Outside(NamedTuple):
    """What connections to the outside need: authorities' files beside the host's own, client certificates by name, and the
    variables that name the host's proxies. A file may begin with "~/"."""

    extra_ca: tuple[str, ...]
    certificates: Mapping[str, ClientCertificate]
    proxies: Mapping[str, str]


def layers_from_json(text: str) -> Layers:
    """What `to_json` has written; "" is nothing at all. Raises InvalidInput."""
    if not text:
        return Layers()
    try:
        table: dict[str, Any] = json.loads(text)
        environment = {str(name): str(value) for name, value in table.get("environment", {}).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"the network policy that the service sent is none: {error}") from error
    return Layers(
        from_dict(table.get("corporate", {}), Layer.CORPORATE, "the corporate file"),
        from_dict(table.get("user", {}), Layer.USER, "the user's file"),
        from_dict(table.get("preset", {}), Layer.PRESET, "the preset"),
        MappingProxyType(environment),
    )


def compose(
    layers: Layers, own: Document, *, floor: Floor, vm: str, version: int = 0, learning: bool = False
) -> tuple[Policy, Outside]:
    """The policy of a VM with the document `own`, and what goes with it. Raises InvalidInput for a client certificate that
    nothing defines."""
    documents = (layers.corporate, own, layers.user)
    certificates: dict[str, ClientCertificate] = {}
    for document in reversed(documents):
        certificates |= document.certificates
    rules = tuple(rule for document in (*documents, layers.preset) for rule in document.rules)
    for rule in rules:
        if rule.certificate is not None and rule.certificate not in certificates:
            raise InvalidInput(
                f"{rule.where}: rule {rule.name}: there is no client certificate {rule.certificate}",
                hint=f"define it in [network.client_certificate.{rule.certificate}] with cert and key",
            )
    policy = Policy(
        rules,
        floor,
        tuple(each for document in documents for each in document.resolve_allow),
        next((document.otherwise for document in documents if document.otherwise), Action.DENY),
        vm,
        version,
        learning,
    )
    proxy = next((document.upstream_proxy for document in documents if document.upstream_proxy), None)
    proxies = layers.environment if proxy is None else {} if proxy == "none" else {"ALL_PROXY": proxy}
    extra_ca = tuple(path for document in documents for path in document.extra_ca)
    return policy, Outside(extra_ca, MappingProxyType(certificates), MappingProxyType(dict(proxies)))


def effective_preset(corporate: Document, own: Document) -> str:
    """The preset of a VM: the company's, where it has one; of a VM that was made before there were any, "off"."""
    return corporate.preset or own.preset or "off"
