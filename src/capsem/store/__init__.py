"""Durable state on the host: names of files, records, layers, locks."""
