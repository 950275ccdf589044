"""`python -m lmtrain`, the same as `lmtrain`."""

import sys

from lmtrain.cli import main

sys.exit(main())
