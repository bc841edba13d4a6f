"""Capsem: Linux machines for AI agents, hardware-isolated, persistent by name, suspended and forked at will.

`from capsem import Sandbox, AsyncSandbox`, and the errors they raise. Nothing of that is imported before somebody asks
for it: the command line starts with this module too, and so does the guest's agent.
"""

__version__ = "1.0.0"

_SDK = {
    "Sandbox": "capsem.sdk.sync",
    "Process": "capsem.sdk.sync",
    "AsyncSandbox": "capsem.sdk.aio",
    "AsyncProcess": "capsem.sdk.aio",
    "Output": "capsem.sdk.types",
    "Result": "capsem.sdk.types",
    "CommandFailed": "capsem.sdk.types",
    "Client": "capsem.client.sync",
}
_ERRORS = (
    "AlreadyExists CapsemError Corrupt GuestFailed HostNotReady Interrupted InvalidInput LimitReached MachineFailed "
    "NotFound NotRunning PayloadTooLarge PermissionDenied TimedOut Unavailable Unsupported WrongState"
).split()

__all__ = [*_SDK, *_ERRORS, "__version__"]  # noqa: PLE0604  all of them are names


def __getattr__(name: str) -> object:
    module = _SDK.get(name) or ("capsem.model.errors" if name in _ERRORS else None)
    if module is None:
        raise AttributeError(f"module 'capsem' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
