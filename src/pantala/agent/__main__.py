"""`python -m pantala.agent`."""

import sys

from pantala.agent.main import main

sys.exit(main())
