"""`python -m mechvlm.cli`."""

import sys

from mechvlm.cli import main

sys.exit(main())
