"""`python -m advdiff_cli`, for torchrun and accelerate launch."""

from advdiff_cli.main import main

if __name__ == "__main__":
    main()
