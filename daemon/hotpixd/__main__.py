"""`python -m hotpixd` is `hotpixd`."""

from hotpixd.cli import main

main()
