"""`python -m openshell_supervisor`, the same as the console script."""

import sys

from openshell_supervisor.cli import main

sys.exit(main())
