"""Drivers: what turns a frozen machine description into a running machine."""
