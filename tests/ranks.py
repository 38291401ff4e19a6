"""Fits one after the other on the ranks of one launch: ``torchrun ranks.py FILE``.

The file is a JSON list of runs, each the arguments of ``thinktuning``. An error ends them all.
"""

import json
import sys
from pathlib import Path

from thinktuning.cli import main

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        main(arguments)
