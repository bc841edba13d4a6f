"""The daemon: one per user; which VMs there are, and what may be done with them."""
