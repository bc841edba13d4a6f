"""The guest agent. Runs in the VM under the guest's own Python; imports the standard library and `capsem.wire`, nothing else."""
