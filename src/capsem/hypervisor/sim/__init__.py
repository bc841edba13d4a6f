"""A simulated hypervisor: `CAPSEM_HYPERVISOR=sim`, or `SimDriver` in a test's own process under its own clock.

It is faithful where the control plane can tell: the real guest protocol, real files of the store (small ones), saves
that freeze a layer and write RAM and device state, a guest whose page cache, commands and identity lie in that RAM. It
fails where it is told to (`plan`), and has the weakness that shaped the product (`host`): where a save or a restore
overlaps with what happens to another machine of the same host, the restored guest loses its disk.

What it does not have is a Linux. The guest runs a few scripted commands (`shell`).
"""
