"""Property tests draw the same examples in every run: what fails in CI fails here. EXPLORE=1 draws new ones."""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)  # how long one takes is the machine's
if not os.environ.get("EXPLORE"):
    settings.load_profile("repeatable")
