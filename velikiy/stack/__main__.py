"""Run the commands of `./run` that concern a running stack."""

import sys

from velikiy.stack.commands import main

sys.exit(main())
