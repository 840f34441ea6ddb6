"""How it looks: `python app.py` is `hybrid serve`, the page and the API on one port."""

import sys

from hybrid.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
