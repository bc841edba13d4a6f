"""The protocol of the control channel, without any I/O; shared by both ends, standard library only."""
