"""The part of the protocol between service and supervisor (`internal`) that is about secrets.

A supervisor knows what its VM may have put in (egress.grants.Grant), from its bootstrap or a `SetSecrets`, and no value. When
it needs one, it asks on the streams that services keep open for that, and forgets it after the time it is told.
"""

from __future__ import annotations

from capsem.wire.schema import Message


class LendSecrets(Message, tag="lend-secrets"):
    """Whoever opens this answers each `SecretWanted` on it with a `SecretValue`, until it gives the stream up."""


class SecretWanted(Message, tag="secret-wanted"):
    """On a LendSecrets stream, from the supervisor: the value of this secret is needed."""

    secret: str


class SecretValue(Message, tag="secret-value"):
    """On a LendSecrets stream, from the service: it, for so many seconds; or `problem`, why there is none, for people."""

    secret: str
    value: str | None = None
    seconds: float = 0.0
    problem: str | None = None

    def __repr__(self) -> str:
        return f"SecretValue(secret={self.secret!r})"


class SecretsLent(Message, tag="secrets-lent"):
    """Closes a LendSecrets stream."""


class SetSecrets(Message, tag="set-secrets"):
    """The VM has these grants from here on, as grants.to_json has them; values that are kept are forgotten."""

    grants: str


class SecretsSet(Message, tag="secrets-set"):
    """Closes a SetSecrets stream: it is so."""


SECRET_REQUESTS: dict[type[Message], type[Message]] = {LendSecrets: SecretsLent, SetSecrets: SecretsSet}
SECRET_MESSAGES: tuple[type[Message], ...] = (SecretWanted, SecretValue)
