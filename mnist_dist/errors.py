"""The two ways in which a start can end badly without being a bug.

Both carry one sentence for a person. The entry point prints it and turns it into an exit code;
anything else that is raised is a bug and keeps its traceback.
"""


class RequestError(Exception):
    """What was asked for is wrong: exit code 2. The sentence names it, what is allowed and what to do."""


class RunError(Exception):
    """The run cannot go on through no fault of the request (a full disk, a loss that is not finite): exit code 1."""
