"""For every kind of test. Hypothesis on machines that do other work at the same time: nothing is judged by how long it
takes."""

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# A shell's background job ignores it, and so would every process that the tests start, of which some are to end by it.
signal.signal(signal.SIGINT, signal.default_int_handler)
