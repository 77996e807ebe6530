"""`python -m receiver`: the receiver process."""

import sys

from receiver.service import register
from shared.compute import keep_memory
from shared.rpc import serve
from shared.settings import settings_from_flags

if __name__ == "__main__":
    keep_memory()
    sys.exit(serve(settings_from_flags("receiver"), "receiver", register))
