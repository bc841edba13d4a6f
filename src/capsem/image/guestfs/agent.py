"""Starts the guest agent; Python runs this with nothing of the guest's own on its path (-I -S)."""

import sys

sys.path.insert(0, "/usr/lib/capsem")

from capsem.guest.__main__ import main

sys.exit(main([]))
