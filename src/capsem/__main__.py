"""`python -m capsem` is the command line."""

import sys

from capsem.cli.main import main

sys.exit(main())
