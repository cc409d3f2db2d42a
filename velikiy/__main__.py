import sys

from velikiy.command_line import end_on_ctrl_c


def main() -> int:
    end_on_ctrl_c()
    from velikiy import cli  # takes a third of a second

    return cli.main()


sys.exit(main())
