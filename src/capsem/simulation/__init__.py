"""The control plane under a simulated host: service, supervisors, guests and clients in one process, in virtual time.

    loop      an event loop whose order of events comes from a seed, and whose time passes when nothing else happens
    process   processes of that host: they die at any await, or before any change of a file, and leave no last words
    network   byte streams between them: late, in pieces, cut
    host      the two, the clock and the randomness, as a `capsem.system.System`
    world     a service on that host, its supervisors, its clients' calls, and what is done to them
    history   what clients were told, hence what has to be true
    clients   random operations, held against their history
    check     what has to hold once it is quiet
    __main__  seeds: run, replay, make smaller

Nothing of the product is replaced but what `capsem.system` and the hypervisor's driver stand for. The files are real.
"""
