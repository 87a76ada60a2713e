"""The exit codes of a training run, for scripts and schedulers."""

from enum import IntEnum


class ExitCode(IntEnum):
    """0 to 2 are as everywhere; the rest are of sysexits.h and above, where no shell or launcher has its own."""

    DONE = 0
    FAULT = 1  # of the program or the machine: the traceback says more
    WRONG_INPUT = 2  # one line on stderr for each thing that is wrong
    LOST_PEER = 70  # another rank ended first, and has said why
    HUNG = 71  # the watchdog ended a run that stood still
    OUT_OF_MEMORY = 72
    DIVERGED = 73  # the loss is not finite, or ranks hold different weights
    NO_CHECKPOINT = 74  # a checkpoint could not be written: disk full, folder not writable
    STOPPED = 75  # told to stop, and saved: started again, the run goes on where it stood
