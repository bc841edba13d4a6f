"""What clients may ask about secrets: which there are, set one, take one away, try one. Values come in, and never go out."""

from __future__ import annotations

from typing import Any

from capsem import config
from capsem.api.secret_types import SecretInfo, SecretsResponse, SecretTestResponse, SetSecretRequest
from capsem.egress.grants import check_name
from capsem.model.errors import CapsemError, InvalidInput, host_failed
from capsem.service.fleet import Fleet
from capsem.service.secret_settings import Secret, from_table
from capsem.service.secrets import Secrets, kept_source


class SecretDesk:
    """For one service."""

    def __init__(self, fleet: Fleet, secrets: Secrets) -> None:
        self._fleet = fleet
        self._secrets = secrets

    async def list(self) -> SecretsResponse:
        """Every secret, and whom it is lent to."""
        return SecretsResponse(secrets=[self._info(secret) for secret in self._secrets.all()])

    def _info(self, secret: Secret, stored_in: str | None = None) -> SecretInfo:
        header = secret.places.header
        return SecretInfo(
            name=secret.name,
            source=secret.source.shown,
            hosts=[*secret.hosts],
            where=secret.where,
            header=header if isinstance(header, bool) else [*header],
            basic=secret.places.basic,
            query=secret.places.query,
            body=secret.places.body,
            env=secret.env,
            prefix=secret.prefix,
            ttl=secret.ttl,
            vms=[vm.id for vm in self._fleet.all() if secret.name in vm.record.secrets],
            stored_in=stored_in,
        )

    async def set(self, name: str, request: SetSecretRequest) -> SecretInfo:
        """Define it. Raises InvalidInput, HostNotReady, Corrupt."""
        check_name(name)
        if (request.source is None) == (request.value is None):
            raise InvalidInput("a secret has either a source or a value", hint="give one of them")
        table: dict[str, Any] = {
            "name": name,
            "source": request.source if request.source is not None else str(kept_source(name)),
            "hosts": request.hosts,
            "header": request.header,
            "basic": request.basic,
            "query": request.query,
            "body": request.body,
            "ttl": request.ttl,
            **({"env": request.env} if request.env is not None else {}),
            **({"prefix": request.prefix} if request.prefix is not None else {}),
        }
        secret = from_table(table, config.user_file(self._secrets.environ))
        try:
            stored_in = await self._secrets.set(secret, request.value)
        except OSError as error:
            raise host_failed(f"the secret {name} could not be set", error) from error
        return self._info(self._secrets.get(name), stored_in)

    async def remove(self, name: str) -> None:
        """Take it away. Raises NotFound, InvalidInput, HostNotReady, Corrupt."""
        try:
            await self._secrets.remove(check_name(name))
        except OSError as error:
            raise host_failed(f"the secret {name} could not be removed", error) from error

    async def test(self, name: str) -> SecretTestResponse:
        """Ask its source. Raises NotFound."""
        self._secrets.get(check_name(name))
        began = self._fleet.system.clock.monotonic()
        try:
            value = await self._secrets.value(name, anew=True)
        except CapsemError as error:
            return SecretTestResponse(ok=False, problem=error.message)
        took = (self._fleet.system.clock.monotonic() - began) * 1000
        return SecretTestResponse(ok=True, length=len(value.text), took_ms=round(took, 1))
