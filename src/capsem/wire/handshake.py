"""How an epoch begins, as one small state table for each end.

    host                               guest
    WAITING   <- nonce, Ready          sends nonce + Ready when it starts, or when the host's nonce arrives
    OFFERED   -> nonce, BootConfig ... collects
    DONE      <- BootReady             writes the next nonce down, then BootReady

Each direction of an epoch begins with the epoch's nonce. While the handshake runs, both ends stay armed for its own
nonce, so that it can be begun again; after it, for the next one. A handshake that does not finish in time is begun
again by the host.

The guest's version is the one that is spoken. The host knows that and the one before.
"""

from __future__ import annotations

from capsem.wire.frames import ProtocolError, check_nonce
from capsem.wire.messages import OLDEST_PROTOCOL, PROTOCOL_VERSION, BootConfig, BootConfigDone, BootReady, Ready, SetEnv
from capsem.wire.schema import Message

WAITING, OFFERED, DONE = "waiting", "offered", "done"


class VersionMismatch(ProtocolError):
    """The other end speaks another version: no new epoch will change that."""


class HostHandshake:
    """The host's end: feed it the guest's control messages; it says what to send."""

    def __init__(self) -> None:
        self.state = WAITING
        self.ready: Ready | None = None
        self.boot_ready: BootReady | None = None
        self._offered = 0

    def receive(self, message: Message) -> None:
        """Take a control message. Raises ProtocolError when it does not belong here, or the versions do not match."""
        if self.state == WAITING and isinstance(message, Ready):
            if not OLDEST_PROTOCOL <= message.protocol <= PROTOCOL_VERSION:
                raise VersionMismatch(
                    f"the guest agent speaks protocol {message.protocol}, this host {PROTOCOL_VERSION}"
                )
            self.ready = message
        elif self.state == OFFERED and isinstance(message, BootReady):
            if message.epoch == self._offered:  # else it is an older offer's, of an agent that died since
                self.boot_ready = message
                self.state = DONE
        else:
            raise ProtocolError(f"{message.tag} while {self.state}")

    def offer(self, config: BootConfig, env: dict[str, str]) -> list[Message]:
        """The answer to Ready."""
        self.state = OFFERED
        self._offered = config.epoch
        return [config, *(SetEnv(name=name, value=value) for name, value in env.items()), BootConfigDone()]


class GuestHandshake:
    """The guest's end: collects the configuration."""

    def __init__(self) -> None:
        self.state = WAITING
        self.config: BootConfig | None = None
        self.next_nonce = b""
        self.env: dict[str, str] = {}

    def receive(self, message: Message) -> bool:
        """Take a control message; True when the configuration is complete. Raises ProtocolError."""
        if isinstance(message, BootConfig) and self.state == WAITING:
            if message.protocol != PROTOCOL_VERSION:
                raise VersionMismatch(f"the host speaks protocol {message.protocol}, this agent {PROTOCOL_VERSION}")
            try:
                self.next_nonce = check_nonce(bytes.fromhex(message.next_nonce))
            except ValueError:
                raise ProtocolError("bad epoch nonce") from None
            self.config, self.env, self.state = message, {}, OFFERED
        elif isinstance(message, SetEnv) and self.state == OFFERED:
            self.env[message.name] = message.value
        elif isinstance(message, BootConfigDone) and self.state == OFFERED:
            self.state = DONE
            return True
        else:
            raise ProtocolError(f"{message.tag} while {self.state}")
        return False
