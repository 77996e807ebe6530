"""The exception tree, and what each branch means to a caller on either side of the wire.

::

    EdscError                     500  INTERNAL
    |-- InvalidRequest            422  INVALID_ARGUMENT
    |   |-- InstructionRefused    422    the sentence asks for nothing that can be done
    |   |-- NoFaceFound           422
    |   |-- RateUnreachable       422    the picture has no form that fits into the channel uses
    |   |-- UnsupportedImage      415
    |   `-- PayloadTooLarge       413
    |-- Unauthorized              401  UNAUTHENTICATED
    |-- NotFound                  404  NOT_FOUND
    |-- Conflict                  409  ABORTED
    |-- Busy                      429  RESOURCE_EXHAUSTED
    |   `-- RateLimited           429    this caller asks too often
    |-- Cancelled                 499  CANCELLED
    |-- Unavailable               503  UNAVAILABLE
    |-- DeadlineExceeded          504  DEADLINE_EXCEEDED
    `-- BundleError               500  FAILED_PRECONDITION

`kind` travels beside the gRPC status, so the exception that leaves one process is the exception
that arrives in the next.
"""

from typing import ClassVar


class EdscError(Exception):
    """Anything this system raises on purpose; the message names what was got and expected."""

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"

    @property
    def kind(self) -> str:
        """Name of the class: what travels in the `edsc-error-kind` trailer."""
        return type(self).__name__


class InvalidRequest(EdscError):
    """The request cannot be served as it stands; sending it again changes nothing."""

    http_status = 422
    grpc_code = "INVALID_ARGUMENT"


class InstructionRefused(InvalidRequest):
    """The sentence asks for nothing that can be changed; the message says what can be asked."""


class NoFaceFound(InvalidRequest):
    """The upload shows no face that the face finder believes in."""


class RateUnreachable(InvalidRequest):
    """A picture codec has no stream small enough for the channel uses that the scheme allows."""


class UnsupportedImage(InvalidRequest):
    """The bytes are not a picture of a supported format."""

    http_status = 415


class PayloadTooLarge(InvalidRequest):
    """More bytes or pixels than the stated limit."""

    http_status = 413


class Unauthorized(EdscError):
    """No API key, or one that is not known here."""

    http_status = 401
    grpc_code = "UNAUTHENTICATED"


class NotFound(EdscError):
    """No such edit, picture or scheme."""

    http_status = 404
    grpc_code = "NOT_FOUND"


class Busy(EdscError):
    """The bounded queue is full: come back later."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"


class RateLimited(Busy):
    """This caller has used up its share for now, whatever else the service is doing."""


class Conflict(EdscError):
    """The state that something is in does not allow what was asked."""

    http_status = 409
    grpc_code = "ABORTED"


class Cancelled(EdscError):
    """The caller went away, so the work was dropped."""

    http_status = 499
    grpc_code = "CANCELLED"


class Unavailable(EdscError):
    """A service is down, starting or draining."""

    http_status = 503
    grpc_code = "UNAVAILABLE"


class DeadlineExceeded(EdscError):
    """The time given with the request ran out."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"


class BundleError(EdscError):
    """A weight bundle is missing, incomplete or not what its hashes say."""

    grpc_code = "FAILED_PRECONDITION"


def _tree(root: type[EdscError]) -> dict[str, type[EdscError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


by_kind: dict[str, type[EdscError]] = _tree(EdscError)
