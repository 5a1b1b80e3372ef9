"""What can end a verb without being a bug, and the exit code of each.

    JobError                  one sentence for a person
    ├── StoppedEarlyError  3  it was asked to stop before it had begun
    ├── RequestError       2  what was asked for is wrong
    │   └── DownloadError  2  the dataset is not here and could not be brought here
    └── RunError           1  the run cannot go on, through no fault of the request
        ├── StorageError   1  a file could not be written
        ├── RankLostError  1  a rank was lost while the ranks were joining
        ├── NotFiniteError 1  the loss, or a weight, is not a number any more
        └── ReplicaError   1  the ranks hold different weights

Anything else that is raised is a bug, and keeps its traceback.
"""

FINISHED = 0  # exit code, also where there was nothing left to do
STOPPED = 3  # exit code of a run that was asked to stop and can go on


class JobError(Exception):
    """One sentence: what is wrong, what is allowed, what to do."""

    exit_code = 1
    cause = "error"  # in the `failed` record of metrics.jsonl, by which scripts decide

    def __init__(self, sentence: str, *, on_every_rank: bool = False) -> None:
        """`on_every_rank`: all ranks raise it together, so that rank 0 alone says it."""
        super().__init__(sentence)
        self.on_every_rank = on_every_rank


class StoppedEarlyError(JobError):
    """It was asked to stop before it had begun; starting it again loses nothing."""

    exit_code = STOPPED


class RequestError(JobError):
    """What was asked for is wrong."""

    exit_code = 2
    cause = "request"


class DownloadError(RequestError):
    """The dataset is not here and could not be brought here."""


class RunError(JobError):
    """The run cannot go on, through no fault of the request."""


class StorageError(RunError):
    """A file could not be written."""

    cause = "storage"


class RankLostError(RunError):
    """A rank was lost while the ranks were joining; the watchdog says so from then on."""

    cause = "rank_lost"


class NotFiniteError(RunError):
    """The loss, or a weight, is not a number any more."""

    cause = "not_finite"


class ReplicaError(RunError):
    """The ranks hold different weights."""

    cause = "replicas_differ"


def one_line(error: Exception) -> str:
    """What another library's exception says first, or its name where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
