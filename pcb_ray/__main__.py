"""`python -m pcb_ray` is `pcb-ray`."""

import sys

from pcb_ray.cli import main

sys.exit(main())
