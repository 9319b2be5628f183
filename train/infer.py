"""``torchrun -m mammostream.train.infer ...``: ``mammostream infer`` under the name that job scripts know."""

import sys

from mammostream.cli import main

if __name__ == "__main__":
    sys.argv[:1] = ["mammostream", "infer"]
    main()
