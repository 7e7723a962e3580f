"""``python -m proxy`` is ``xo-proxy``."""

from proxy.cli import main

main()
