"""`python -m g2vlm` is the `g2vlm` command."""

import sys

from g2vlm.cli import main

sys.exit(main())
