"""The crash tests of a service use the world that the contract tests have made."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
