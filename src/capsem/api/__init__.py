"""The service's contract, as data."""
