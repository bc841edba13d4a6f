"""Values and rules: what a VM is and what may happen to it. No I/O, no clock, no randomness, no asyncio."""
