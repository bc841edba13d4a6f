"""The one way out of a VM: streams that its guest opens, judged, carried out and recorded on the host.

    stream in -> first bytes -> hello or head -> judge(name) -> [ask] -> resolve, floor -> dial -> TLS
              -> per request: judge, swap secrets, forward, tap, record

Nothing that the guest says of itself is believed: not the address that it wanted, nor the process. The host judges the name
that it has parsed itself, resolves it itself, checks every address, and dials the very one that it has checked.

What parses bytes has no I/O (`hello`, `http1`, `dns`, `taps`); what decides is pure (`judge`, `policy`); the rest is handed its
clock, resolver, dialer, authority, broker and recorder. One supervisor carries its own VM's traffic.
"""
