"""One process per running VM: it owns the machine and speaks with the guest."""
