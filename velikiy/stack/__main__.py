"""Run the commands of `./run` that concern a stack."""

import sys

from velikiy.command_line import end_on_ctrl_c


def main() -> int:
    end_on_ctrl_c()
    from velikiy.stack import commands  # takes a third of a second

    return commands.main()


sys.exit(main())
