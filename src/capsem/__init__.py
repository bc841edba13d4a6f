"""Capsem: Linux machines for AI agents, hardware-isolated, persistent by name, suspended and forked at will."""

__version__ = "1.0.0"
