"""`python -m baselines`: the optional process that carries the schemes compared with."""

import sys

from baselines.service import register
from shared.rpc import serve
from shared.settings import settings_from_flags

if __name__ == "__main__":
    sys.exit(serve(settings_from_flags("baselines"), "baselines", register))
