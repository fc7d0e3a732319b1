"""Support `python -m advdiff_cli`, as torchrun and accelerate launch need it."""

from advdiff_cli.main import main

if __name__ == "__main__":
    main()
