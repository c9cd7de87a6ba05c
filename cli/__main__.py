"""`python -m moss_jt.cli` is `moss-jt`."""

from moss_jt.cli.main import main

main()
