"""A lowered adapter's way from its file to the memory that the device copies from, in a process beside the engine's.

    placement   the one form -> the arrays that the pool takes        stager    that process: file -> pieces of images
    lending     which of them another adapter has already
    buffer      memory that both processes map, cut into pieces       staging   the engine's end of it
    messages    what the two say to each other                        launch    that process, started
    channel     how the engine says and hears it without waiting

Why a process: reading an adapter is thousands of small steps in Python. In a thread of the engine's process each of
them takes the interpreter's lock from the thread that runs the steps, which waits up to 5 ms for it every time.
"""

from loramux.staging.messages import Failed, Planned, Setup, Staged
from loramux.staging.placement import BaseBiases
from loramux.staging.staging import Staging, StagingEnded

__all__ = ["BaseBiases", "Failed", "Planned", "Setup", "Staged", "Staging", "StagingEnded"]
