"""How a program speaks to the service."""
