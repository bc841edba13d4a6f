"""For every kind of test. Hypothesis on machines that do other work at the same time: nothing is judged by how long it
takes."""

from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
