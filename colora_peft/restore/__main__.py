"""Restores images by the network and the adapters that the command line names, as `colora-restore` does."""

import sys

from .command import run_command

if __name__ == "__main__":
    sys.argv[0] = "colora-restore"  # the name in messages
    run_command()
