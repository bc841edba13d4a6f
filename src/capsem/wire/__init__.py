"""The control channel's protocol, without any I/O; shared by host and guest, standard library only.

Theory of operation. One byte stream each way (a virtio-serial port, or a Unix socket between service and supervisor)
carries *frames* (frames.py). Frames carry *messages* (messages.py: each defined once) and the data of any number of
*streams* (streams.py), each with its own flow control, so that a reader who stalls stops its own stream and nothing
else. A connection lives through *epochs* (handshake.py): a cold boot, a resume, a fork or a restarted guest agent
begins a new one, announced in the raw byte stream by a 16-byte nonce, which resynchronises both ends even in the
middle of a half-read frame.

Garbage, whole or a byte at a time, ends in `ProtocolError` and in no other exception.

The guest imports this under emulation, where every module of the standard library costs milliseconds: that is why
there are no dataclasses, enums or typing imports here.
"""
