"""`capsem stress`: services and VMs of its own under load, with everything that was acknowledged held against what is there.

options   what to do            truth     what the host knows of a VM: the files, the memory that it must have
hosts     services, each with a home of its own, and what is left of them
guests    the commands by which a guest is told to write, and asked what it has
clients   many threads that write, suspend, resume, fork, roll back, check, and get into each other's way
report    counts, latencies, anomalies with their evidence            run   all of it, from the first to the last
"""
