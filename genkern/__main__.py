"""`python -m genkern` is the `genkern` command."""

import sys

from genkern.cli import main

sys.exit(main())
