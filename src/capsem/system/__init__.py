"""The seam to the host: clock, randomness, processes and channels, passed in to everything that decides."""
