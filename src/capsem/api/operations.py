"""Every operation of the service, once: routes, clients, state checks and docs are derived from OPERATIONS.

What a row says is told by `operation.Operation`; the rows stand by idea in `vm_operations`, `guest_operations`,
`checkpoint_operations`, `ledger_operations`, `network_operations`, `secret_operations` and `host_operations`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from capsem.api.checkpoint_operations import CHECKPOINT_OPERATIONS
from capsem.api.guest_operations import GUEST_OPERATIONS
from capsem.api.host_operations import HOST_OPERATIONS
from capsem.api.ledger_operations import LEDGER_OPERATIONS
from capsem.api.network_operations import NETWORK_OPERATIONS
from capsem.api.secret_operations import SECRET_OPERATIONS
from capsem.api.vm_operations import VM_OPERATIONS

_TABLE: Final = (
    *VM_OPERATIONS,
    *GUEST_OPERATIONS,
    *CHECKPOINT_OPERATIONS,
    *LEDGER_OPERATIONS,
    *NETWORK_OPERATIONS,
    *SECRET_OPERATIONS,
    *HOST_OPERATIONS,
)

OPERATIONS: Final = MappingProxyType({operation.name: operation for operation in _TABLE})
