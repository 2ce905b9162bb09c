"""Every error a caller may want to tell apart, as one tree.

AfterimageError
  - BitstreamError          the client's bytes are wrong              (422)
    · MalformedHeader       nothing, or less than a header            (400)
    · UnsupportedCodec      a magic, model or metric we do not know   (415)
    · LengthMismatch        lengths or shapes that contradict         (422)
    · ChecksumMismatch      a checksum that does not hold             (422)
    · CorruptStream         entropy coded bytes that cannot be        (422)
    · DesynchronisedStream  they decode, but not to what was encoded  (422)
    · WrongWeights          coded with weights that we do not have    (422)
  - PictureTooLarge         more declared pixels than the limit       (413)
  - PictureError            a picture that cannot be encoded          (422)
    · UnsupportedPicture    not a picture format we read              (415)
  - ParameterError          tier, seed, quality … out of range        (422)
  - Quarantined             the bitstream ended two workers           (422)
  - Canceled                the caller no longer wants the picture
  - WeightsError            ours are missing or altered               (500)
"""

from typing import ClassVar


class AfterimageError(Exception):
    """Base of all errors of this project; its text is fit to be shown to a client.

    `kind` names the class to clients (the last part of a problem's `type`) and never changes.
    """

    kind: ClassVar[str] = "afterimage-error"


class BitstreamError(AfterimageError):
    """The bitstream is wrong."""

    kind = "bitstream-error"


class MalformedHeader(BitstreamError):
    """Nothing, or less than a header."""

    kind = "malformed-header"


class UnsupportedCodec(BitstreamError):
    """A magic, version, model, metric or profile that we do not decode."""

    kind = "unsupported-codec"


class LengthMismatch(BitstreamError):
    """Declared lengths or shapes contradict each other or the bytes present."""

    kind = "length-mismatch"


class ChecksumMismatch(BitstreamError):
    """A checksum in the bitstream does not hold."""

    kind = "checksum-mismatch"


class CorruptStream(BitstreamError):
    """The entropy coded bytes end early or hold impossible values."""

    kind = "corrupt-stream"


class DesynchronisedStream(BitstreamError):
    """The entropy decoder did not end where every encoder begins."""

    kind = "desynchronised-stream"


class WrongWeights(BitstreamError):
    """The bitstream was made with other weights than ours."""

    kind = "wrong-weights"


class PictureTooLarge(AfterimageError):
    """More pixels than the limit."""

    kind = "picture-too-large"


class PictureError(AfterimageError):
    """A picture that cannot be read or encoded."""

    kind = "picture-error"


class UnsupportedPicture(PictureError):
    """Not a picture format that we read."""

    kind = "unsupported-picture"


class ParameterError(AfterimageError):
    """A parameter outside its published range."""

    kind = "parameter-error"


class Quarantined(AfterimageError):
    """Two workers died while they drew from this bitstream: it is refused for a day."""

    kind = "quarantined"


class Canceled(AfterimageError):
    """The caller no longer wants the picture."""

    kind = "canceled"


class WeightsError(AfterimageError):
    """Weights are missing or altered."""

    kind = "weights-error"
