"""``python -m fourmill`` is the ``fourmill`` command."""

from fourmill.flows.cli import main

if __name__ == "__main__":
    main()
