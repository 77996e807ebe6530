"""`python -m channel_sim`: the channel process."""

import sys

from channel_sim.service import register
from shared.rpc import serve
from shared.settings import settings_from_flags

if __name__ == "__main__":
    sys.exit(serve(settings_from_flags("channel"), "channel", register))
