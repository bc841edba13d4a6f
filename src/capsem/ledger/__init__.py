"""The session ledger: what happened in a VM, and which VMs there were, in SQLite files that anybody may read."""
