"""`python -m transmitter`: the transmitter process."""

import sys

from shared.compute import keep_memory
from shared.rpc import serve
from shared.settings import settings_from_flags
from transmitter.service import register

if __name__ == "__main__":
    keep_memory()
    sys.exit(serve(settings_from_flags("transmitter"), "transmitter", register))
