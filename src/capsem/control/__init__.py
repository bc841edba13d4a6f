"""The host end of the control channel: the guest agent's services as coroutines."""
